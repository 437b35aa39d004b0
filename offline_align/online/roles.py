"""What the roles of PPO compute for a rollout: answers, scores, log-probabilities and values."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offline_align.config.sections import (
    ComputeSection,
    DataSection,
    ModelSection,
    ParallelSection,
    PolicyOptimizationMethodSection,
)
from offline_align.convert.live import live_tensors
from offline_align.data.bins import RowSource, SampleSource, shares_prompts
from offline_align.data.journal import Journal
from offline_align.data.loader import Loader
from offline_align.data.pack import padding_multiple
from offline_align.data.records import Prompt, Sample, TrainingRow
from offline_align.data.rollout import Numbers, RolloutColumns, SampledAnswer
from offline_align.data.rollout_source import RolloutSource
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedRows, tokenize_samples
from offline_align.distributed.setup import Ranks
from offline_align.distributed.stopping import StopRequest
from offline_align.generate import rollout
from offline_align.generate.requests import Completion, Request, RolloutEngine
from offline_align.label.scoring import score_all
from offline_align.label.statistics import RewardStats
from offline_align.model.context_sum import at_all_targets
from offline_align.model.heads import Policy, RewardModel
from offline_align.model.passes import Compute, plan_bins, target_numbers
from offline_align.objectives import Objective, ppo
from offline_align.online.learner import Learner
from offline_align.train.step import weights_in_place


@dataclass(frozen=True)
class Sampler:
    """The engine that answers, with the weights that the actor has."""

    engine: RolloutEngine
    actor: Learner[Policy]
    model: ModelSection
    dtype: torch.dtype
    ranks: Ranks

    def answers(self, requests: Sequence[Request], journal: Journal, seed: int, stop: StopRequest) -> list[Completion]:
        """Return the actor's answers, in the order of the requests, on every rank.

        They depend on its weights, the requests and `seed` alone. Raises StoppedEarly, with the finished
        answers in the journal.
        """
        self.engine.resume()
        with weights_in_place(self.actor.model):
            self.engine.replace_weights(live_tensors(self.actor.module, self.model, "policy", self.dtype))
        self.engine.reseed(seed)
        try:
            return rollout.rollout(self.engine, requests, journal, self.ranks, stop)
        finally:
            self.engine.release()


@dataclass(frozen=True)
class Scorer:
    """A frozen reward model's view of answers: the text, encoded as in its training."""

    renderer: Renderer
    data: DataSection
    parallel: ParallelSection
    compute: ComputeSection
    statistics: RewardStats | None
    """Normalises the scores; None leaves them as they are."""
    ranks: Ranks
    folder: Path
    """For temporary files."""

    def scores(self, model: RewardModel, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> list[float]:
        """Return the raw score of every answer, read at its last token, on every rank.

        A truncated answer has no end of sequence, so it is read at its last real token.
        """
        rows = self._rows(prompts, answers)
        ended = np.array([answer.finish_reason == "stop" for answer in answers])
        source = SampleSource(_without_ends(rows, ~ended), shares_prompts(self.compute, self.parallel))
        bins = plan_bins(source, self.compute.micro_batch_size * self.data.max_length)
        model.set_is_first_microbatch()
        model.reads_targets = False
        found = score_all(model, source, bins, self.ranks)
        model.reads_targets = True
        return [found[place] for place in range(len(answers))]

    def normalised(self, raw: Sequence[float]) -> list[float]:
        """Return `(raw - mean) / std` with the fixed statistics."""
        return [float(normalised(one, self.statistics)) for one in raw]

    def _rows(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> TokenizedRows:
        samples = [
            TrainingRow(Sample(str(k), prompt.prompt, answer.response, {}))
            for k, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        # The rows are read once, so their tokens are not kept. Each rank has its own copy.
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            rows = tokenize_samples(
                samples, self.renderer, self.data, Path(folder), empty_answers=True, announced=False
            )
            return replace(rows, ids=np.array(rows.ids), offsets=np.array(rows.offsets))


def normalised[Value: (float, Tensor)](raw: Value, statistics: RewardStats | None) -> Value:
    """Return `(raw - mean) / std` with the fixed statistics, or `raw` if there are none."""
    if statistics is None or not statistics.std:
        return raw
    return (raw - statistics.mean) / statistics.std


def critic_objective(settings: PolicyOptimizationMethodSection, statistics: RewardStats | None) -> Objective:
    """Return the critic's objective on values that are normalised as the rewards are.

    So a reward model is a critic as it stands: at the last token its value is the answer's reward.
    """
    objective = ppo.critic(settings)
    return lambda values, batch: objective(normalised(values, statistics), batch)


def _without_ends(rows: TokenizedRows, cut: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> TokenizedRows:
    """Return the rows, those that were `cut` without their last token, the end of sequence."""
    lengths = np.diff(rows.offsets)
    keep = np.ones(rows.ids.size, dtype=bool)
    # An answer of no token keeps its end, where it is read.
    shorter = cut & (lengths - rows.target_start > 1)
    keep[rows.offsets[1:][shorter] - 1] = False
    offsets = np.concatenate(([0], np.cumsum(lengths - shorter))).astype(np.int64)
    return replace(rows, ids=rows.ids[keep], offsets=offsets)


@dataclass(frozen=True)
class Forward:
    """Forward passes over answers, and the mini-batches to learn from them."""

    capacity: int
    """Most tokens of a bin."""
    global_batch_size: int
    sequence_parallel: bool
    fp8: bool
    statistics: RewardStats | None
    """The critic's values are normalised with these, as the rewards are."""
    ranks: Ranks

    def log_probs(self, policy: Policy, answers: Sequence[SampledAnswer]) -> list[Numbers]:
        """Return the log-probability in nats of each token of each answer, at the policy's temperature."""
        policy.eval()
        # Weights in fp8 are cached; they have changed since the last pass.
        policy.set_is_first_microbatch()
        return self._numbers(answers, lambda batch: at_all_targets(-policy(batch), batch))

    def values(self, critic: RewardModel, answers: Sequence[SampledAnswer]) -> list[Numbers]:
        """Return the value before each token of each answer, in normalised reward."""
        critic.eval()
        critic.set_is_first_microbatch()
        return self._numbers(answers, lambda batch: at_all_targets(normalised(critic(batch), self.statistics), batch))

    def _numbers(self, answers: Sequence[SampledAnswer], compute: Compute) -> list[Numbers]:
        return target_numbers(compute, RolloutSource(answers), self.capacity, self.ranks, self.sequence_parallel)

    def loader(self, answers: Sequence[SampledAnswer], columns: RolloutColumns, epochs: int, seed: int) -> Loader:
        """Return the mini-batches of an iteration, in an order that depends on `seed` alone."""
        return self.steps(RolloutSource(answers, columns), seed, len(answers) * epochs)

    def steps(self, source: RowSource, seed: int, rows: int) -> Loader:
        """Return the steps of `rows` rows of `source`, over all epochs, in an order that depends on `seed` alone."""
        ranks = self.ranks
        return Loader(
            source=source,
            global_batch_size=self.global_batch_size,
            total_samples=rows,
            capacity=self.capacity,
            seed=seed,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            pad_to_multiple=padding_multiple(ranks.tp_size, ranks.cp_size, self.sequence_parallel, self.fp8),
            cp_rank=ranks.cp_rank,
            cp_size=ranks.cp_size,
        )
