"""A trained role of PPO, the actor or the critic: model, optimizer, update step and checkpoints."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from offline_align.config.sections import OptimSection
from offline_align.data.loader import Loader
from offline_align.data.mixed_steps import with_texts
from offline_align.data.tokenizer import Tokenizer
from offline_align.distributed.setup import Ranks
from offline_align.errors import AlignError
from offline_align.model.description import ModelDescription
from offline_align.model.heads import Policy, RewardModel
from offline_align.objectives import Objective
from offline_align.online.frozen import FrozenWeights
from offline_align.train import checkpoint
from offline_align.train.checkpoint import TrainState
from offline_align.train.optim import learning_rate
from offline_align.train.saving import Saver
from offline_align.train.step import StepResult, TrainStep, weights_in_place

MOST_SKIPPED = 3
"""Steps in a row that may be skipped because a loss or gradient is not finite."""


@dataclass
class Learner[M: nn.Module]:
    """One trained model."""

    name: str
    """`actor` or `critic`, for messages."""
    run_dir: Path
    """The folder that has its `checkpoints/`."""
    module: M
    """The unwrapped model."""
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    objective: Objective
    optim: OptimSection
    frozen: FrozenWeights
    """The weights of the frozen role that shares this model's architecture."""
    description: ModelDescription
    tokenizer: Tokenizer
    ranks: Ranks
    keep: int
    """Number of newest checkpoints to keep."""
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        """Build the update step and the saver."""
        self.step = TrainStep(self.model, self.optimizer, self.objective, self.optim.clip_grad)
        self.saver = Saver(
            self.run_dir, self.module, self.optimizer, self.description, self.tokenizer, self.ranks, self.keep
        )

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are complete, for forward passes outside an update."""
        return weights_in_place(self.model)

    def learn(
        self, data: Loader, first_update: int, total_updates: int, texts: Loader | None = None
    ) -> dict[str, float]:
        """Update on all mini-batches of a rollout; return the means of the metrics over all targets.

        `texts` are learned beside the answers, one step of them in each update. `first_update` is the
        number of updates before this rollout, and `total_updates` that of the run, for the schedule of
        the learning rate. Raises AlignError after `MOST_SKIPPED` updates in a row whose loss or gradient
        was not finite; the weights are then those before them.
        """
        done: list[StepResult] = []
        for number, batch in enumerate(data.steps(0, pinned=self.ranks.device.type == "cuda")):
            if texts is not None:
                batch = with_texts(batch, texts.step(first_update + number))
            rate = learning_rate(first_update + number, self.optim, total_updates)
            done.append(self.step(batch.micro_batches, rate))
            self.skipped_in_a_row = 0 if done[-1].applied else self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= MOST_SKIPPED:
                raise AlignError(
                    f"{self.name}: {MOST_SKIPPED} updates in a row were not finite: lower the learning rate; "
                    "the checkpoints of earlier iterations are kept"
                )
        count = sum(result.count for result in done)
        names = done[0].metrics
        found = {name: sum(r.metrics[name] * r.count for r in done) / max(count, 1) for name in names}
        norms = [result.grad_norm for result in done]
        return found | {
            "grad_norm": max(norms, key=lambda norm: norm if math.isfinite(norm) else math.inf),
            "skipped": float(sum(not result.applied for result in done)),
        }

    def load(self, step: int) -> TrainState:
        """Load the checkpoint after `step` iterations. Raises StorageError on all ranks if it is damaged."""
        folder = checkpoint.step_folder(self.run_dir, step)
        names = checkpoint.damage(folder, self.ranks)
        if names:
            raise checkpoint.error_for_all_ranks(
                f"{folder}: damaged or missing, and its partner after {step} iterations is whole: restore it from a "
                "copy, or remove both folders of checkpoints to train from the start",
                self.ranks,
            )
        return checkpoint.load(self.module, self.optimizer, folder)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of iterations after `step`, whose partner was never saved."""

        def delete() -> None:
            for folder in checkpoint.step_folders(self.run_dir):
                if folder.name > checkpoint.step_folder(self.run_dir, step).name:
                    checkpoint.delete(folder)

        self.ranks.from_main(delete)


def restart(actor: Learner[Policy], critic: Learner[RewardModel]) -> TrainState | None:
    """Load the newest iteration that both learners have saved; None if there is none yet.

    The critic is saved before the actor, so the actor's newest intact checkpoint has a partner. Raises
    StorageError if it has none.
    """
    newest = checkpoint.newest_whole(actor.run_dir, actor.ranks)
    if newest is None:
        critic.forget_after(0)
        return None
    state = checkpoint.read_state(newest)
    critic.load(state.step)
    actor.load(state.step)
    critic.forget_after(state.step)
    critic.saver.update_links_and_prune(state)
    actor.saver.update_links_and_prune(state)
    return state


def save(actor: Learner[Policy], critic: Learner[RewardModel], state: TrainState) -> None:
    """Save both, the critic first, unless this iteration is saved already. Raises StorageError."""
    folder = checkpoint.step_folder(actor.run_dir, state.step)
    if actor.ranks.broadcast(folder.is_dir()):
        return
    critic.saver.save(state)
    actor.saver.save(state)
