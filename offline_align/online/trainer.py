"""The loop of PPO: answers, scores, and updates of critic and actor, one iteration after the other.

An iteration is a pure function of the weights, the optimizer states, `run.seed` and its number. So a
run that was killed repeats the iterations since its last checkpoint with the same bits.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from offline_align import lineage
from offline_align.config.sections import PolicyOptimizationMethodSection, TrainerSection
from offline_align.data.journal import Journal
from offline_align.data.loader import Loader, rows_of_step
from offline_align.data.records import Prompt, write_jsonl
from offline_align.data.rollout import Rollout, RolloutColumns, SampledAnswer
from offline_align.distributed.setup import Ranks
from offline_align.distributed.stopping import StopRequest
from offline_align.errors import AlignError, ConfigError, StoppedEarly, StorageError
from offline_align.generate.requests import Completion, Request
from offline_align.lineage.effort import part
from offline_align.methods import ppo
from offline_align.model.heads import Policy, RewardModel
from offline_align.online import learner
from offline_align.online.learner import Learner
from offline_align.online.roles import Forward, Sampler, Scorer
from offline_align.progress import Meter
from offline_align.train.checkpoint import TrainState
from offline_align.train.metrics import MetricsWriter

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
"""The folder of the answers, one file an iteration."""
# Columns of a prompt's row that belong to another answer.
_REPLACED = ("response", "chosen", "rejected", "answer", "sample_index", "condition")
PHASES = ("generate", "score", "learn")
"""The parts of an iteration whose seconds are metrics (`seconds_generate`, ...) and in the manifest."""


@dataclass
class PolicyOptimization:
    """The parts of a PPO run; `fit` trains until the last iteration or until a stop request."""

    run_dir: Path
    method: PolicyOptimizationMethodSection
    trainer: TrainerSection
    ranks: Ranks
    actor: Learner[Policy]
    critic: Learner[RewardModel]
    sampler: Sampler
    scorer: Scorer
    forward: Forward
    texts: Loader | None
    """Texts that the actor learns beside its answers, a step for each update; None for none."""
    prompts: Sequence[Prompt]
    """The prompts that can be answered; an iteration takes the next ones of a shuffled order."""
    requests: Sequence[Request]
    """The request of each prompt."""
    seed: int
    iterations: int
    settings: str
    """Hash of all settings and data that the iterations depend on."""
    state: TrainState = field(default_factory=TrainState)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def fit(self, stop: StopRequest) -> TrainState:
        """Train until the last iteration and return the state.

        Raises StoppedEarly, after saving, if a stop is requested; ConfigError if the checkpoints belong
        to other settings; StorageError; and AlignError if updates are not finite or the policy has
        collapsed.
        """
        self._resume()
        main = self.ranks.is_main
        with (
            MetricsWriter(self.run_dir, main, self.state.step + 1, wandb_project=self.trainer.wandb_project) as writer,
            Meter("ppo", self.iterations, "iterations", self.state.step, main) as meter,
        ):
            while self.state.step < self.iterations:
                started = time.monotonic()
                stop.doing = f"the answers of this batch in iteration {self.state.step + 1}"
                metrics = self._iteration(self.state.step, stop, writer)
                self.state.step += 1
                self.state.consumed_samples += int(metrics.pop("answers"))
                seconds = time.monotonic() - started
                self.state.seconds += seconds
                writer.write(self.state.step, metrics | {"consumed_samples": self.state.consumed_samples})
                meter.advance(note=f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.3f}")
                stop.expect(2 * seconds)
                stopped = self.ranks.any_rank(stop.reason is not None)()
                interval = self.trainer.save_interval
                due = interval is not None and self.state.step % interval == 0
                if stopped or due or self.state.step == self.iterations:
                    with meter.paused():
                        self._save(writer)
                if stopped and self.state.step < self.iterations:
                    raise self._stopped(stop)
        return self.state

    @part("load")
    def _resume(self) -> None:
        state = learner.restart(self.actor, self.critic)
        if state is None:
            return
        if state.settings != self.settings:
            raise ConfigError(
                f"run.dir={self.run_dir}: has a checkpoint of a run with other settings, weights or data; "
                "repeat the command of that run to continue it, or give another folder"
            )
        self.state = state
        logger.info("ppo: continuing after iteration %d of %d", state.step, self.iterations)

    def _iteration(self, number: int, stop: StopRequest, writer: MetricsWriter) -> dict[str, float]:
        """Run one iteration and return its metrics."""
        seconds: dict[str, float] = {}
        places = self._places(number)
        with self._timed("generate", seconds):
            completions = self._completions(number, places, stop, writer)
        with self._timed("score", seconds):
            rollouts = self._rollouts(places, completions)
            reason = ppo.collapse(rollouts, self.method)
            if reason is not None:
                raise AlignError(
                    f"iteration {number + 1}: {reason}: raise method.kl_coefficient or lower optim.lr; the checkpoints "
                    "of earlier iterations are kept"
                )
            columns = ppo.columns(rollouts, self.method)
        metrics = ppo.metrics(rollouts, columns, self.method)
        stop.doing = f"iteration {number + 1}, then saving a checkpoint"
        with self._timed("learn", seconds):
            metrics |= self._learn(number, rollouts, columns)
        self.ranks.from_main(lambda: self._write(number, places, completions, rollouts))
        return metrics | {"answers": float(len(places))} | {f"seconds_{name}": s for name, s in seconds.items()}

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        started = time.monotonic()
        with part(name):
            yield
        seconds[name] = time.monotonic() - started
        self.seconds[name] += seconds[name]

    def _places(self, number: int) -> list[int]:
        """Return the prompts of an iteration, as indices."""
        size, count = self.method.rollout_batch_size, len(self.prompts)
        total = self.iterations * size
        if self.trainer.max_steps is None:
            total = min(total, count * self.trainer.max_epochs)
        return rows_of_step(number, size, count, total, self.seed)

    def _completions(
        self, number: int, places: Sequence[int], stop: StopRequest, writer: MetricsWriter
    ) -> list[Completion]:
        """Return the actor's answers to the prompts. If a stop is requested, save and raise StoppedEarly."""
        # A prompt may occur twice in an iteration, so a request is known by its place in it.
        asked = [replace(self.requests[prompt], row=k) for k, prompt in enumerate(places)]
        try:
            return self.sampler.answers(asked, self._journal(number), self._seed(number), stop)
        except StoppedEarly:
            self._save(writer)
            raise self._stopped(stop) from None

    def _rollouts(self, places: Sequence[int], completions: Sequence[Completion]) -> list[Rollout]:
        """Return what is known of every answer before the update: score, log-probabilities and values."""
        actor, critic, forward = self.actor, self.critic, self.forward
        prompts = [self.prompts[place] for place in places]
        answers = [
            SampledAnswer(
                row_id=prompt.id,
                context=np.array(self.requests[place].context, dtype=np.int32),
                response=np.array(one.token_ids, dtype=np.int32),
                engine_log_probs=np.array(one.log_probs, dtype=np.float32),
                truncated=one.finish_reason == "length",
            )
            for place, prompt, one in zip(places, prompts, completions, strict=True)
        ]
        with critic.whole(), critic.frozen.in_place(critic.module):
            raw = self.scorer.scores(critic.module, prompts, completions)
        with actor.whole(), actor.frozen.in_place(actor.module):
            reference = forward.log_probs(actor.module, answers)
        with actor.whole(), critic.whole():
            log_probs = forward.log_probs(actor.module, answers)
            values = forward.values(critic.module, answers)
        scored = zip(answers, raw, self.scorer.normalised(raw), log_probs, reference, values, strict=True)
        return [
            answer.measured(score, reward, log_probs=own, reference_log_probs=other, values=value)
            for answer, score, reward, own, other, value in scored
        ]

    def _learn(self, number: int, answers: Sequence[Rollout], columns: RolloutColumns) -> dict[str, float]:
        """Update the critic, then the actor, and return their metrics. The actor waits during the warm-up."""
        data = self.forward.loader(answers, columns, self.method.ppo_epochs, self._seed(number))
        updates, warm_up = data.total_steps, self.method.critic_warmup_iterations
        found = self.critic.learn(data, number * updates, self.iterations * updates)
        metrics = {f"value_{name}" if name == "loss" else f"critic_{name}": value for name, value in found.items()}
        if number >= warm_up:
            first, total = (n - warm_up for n in (number, self.iterations))
            metrics |= self.actor.learn(data, first * updates, total * updates, self.texts)
        return metrics

    def _write(
        self, number: int, places: Sequence[int], completions: Sequence[Completion], rollouts: Sequence[Rollout]
    ) -> None:
        """Write the answers of an iteration as labelled rows, for other stages and people. Raises StorageError."""
        rows = [
            {
                **{k: v for k, v in self.prompts[place].columns.items() if k not in _REPLACED},
                "id": f"{answer.row_id}/{number + 1}/{k}",
                "response": one.response,
                "finish_reason": one.finish_reason,
                "reward_raw": answer.reward_raw,
                "reward": answer.reward,
                "source_id": answer.row_id,
                "kl": float(kl),
                "truncated": answer.truncated,
                "iteration": number + 1,
            }
            for k, (place, one, answer, kl) in enumerate(
                zip(places, completions, rollouts, ppo.kl_of_answers(rollouts), strict=True)
            )
        ]
        folder = self.run_dir / ROLLOUTS
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be created: {error.strerror or error}") from error
        write_jsonl(folder / f"iteration_{number + 1:06d}.jsonl", rows)

    @part("saves")
    def _save(self, writer: MetricsWriter) -> None:
        writer.sync()
        self.state.settings = self.settings
        learner.save(self.actor, self.critic, self.state)
        # No attempt repeats the iterations before; the answers of the next one may have been begun.
        self.ranks.from_main(self._journal(self.state.step).remove_others)

    def forget_journals(self) -> None:
        """Delete all journals, once the run is complete."""
        self._journal(self.state.step).remove()

    def _journal(self, number: int) -> Journal:
        return Journal(self.run_dir, self._hash("rollout", number), self.ranks.rank)

    def _stopped(self, stop: StopRequest) -> StoppedEarly:
        reason = stop.reason or "a request to another rank"
        return StoppedEarly(
            f"stopped by {reason} after iteration {self.state.step} of {self.iterations}; a checkpoint is saved: "
            "run the same command to continue"
        )

    def _seed(self, number: int) -> int:
        """Return the seed of an iteration, below 2^63."""
        return int(self._hash("seed", number)[:15], 16)

    def _hash(self, purpose: str, number: int) -> str:
        return lineage.text_sha256(f"{self.settings} {self.seed} {purpose} {number}")
