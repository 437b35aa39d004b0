"""The loop: steps, validation, checkpoints, early stops and continuation, the same for every objective."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from offline_align.config.sections import OptimSection, TrainerSection
from offline_align.data.batch import PackedBatch
from offline_align.data.loader import Loader, StepData
from offline_align.data.tokenizer import Tokenizer
from offline_align.distributed.setup import Ranks
from offline_align.distributed.stopping import StopRequest
from offline_align.errors import AlignError, ConfigError, StoppedEarly
from offline_align.model.description import ModelDescription
from offline_align.objectives import Objective
from offline_align.progress import Meter
from offline_align.train import checkpoint
from offline_align.train.checkpoint import TrainState
from offline_align.train.metrics import MetricsWriter
from offline_align.train.optim import learning_rate
from offline_align.train.profiling import StepProfiler
from offline_align.train.speed import SpeedMeter
from offline_align.train.step import StepResult, TrainStep, evaluate, weights_in_place

logger = logging.getLogger(__name__)
# Rows packed together for validation: enough to fill the bins of many ranks, few enough to stop between.
_VALIDATION_ROWS = 256
_MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Trainer:
    """Everything a training run is made of; `fit` runs it to its end or to a stop."""

    run_dir: Path
    trainer: TrainerSection
    optim: OptimSection
    ranks: Ranks
    module: nn.Module
    """The model as built."""
    model: DistributedDataParallel
    """The same in megatron's data parallel wrapper."""
    optimizer: MegatronOptimizer
    objective: Objective
    data: Loader
    validation: Loader | None
    description: ModelDescription
    tokenizer: Tokenizer
    speed: SpeedMeter
    settings: str
    """Key of all that the steps depend on; a checkpoint of another key is refused."""
    state: TrainState = field(default_factory=TrainState)

    def fit(self, stop: StopRequest) -> TrainState:
        """Train until the last step and return the state; raises StoppedEarly, with a checkpoint saved, on request.

        Continues from the newest checkpoint of the run folder. Raises ConfigError where that belongs to other
        settings, AlignError where three steps in a row are not finite.
        """
        self._continue()
        train_step = TrainStep(self.model, self.optimizer, self.objective, self.optim.clip_grad)
        total = self.data.total_steps
        main = self.ranks.is_main
        with (
            MetricsWriter(self.run_dir, main, self.state.step + 1) as writer,
            Meter("training", total, "steps", self.state.step, main) as meter,
            StepProfiler(self.trainer.profile_steps, self.run_dir, self.ranks.rank) as profiler,
        ):
            skipped_in_a_row = 0
            upcoming = self.data.steps(self.state.step, pinned=self.ranks.device.type == "cuda")
            while self.state.step < total:
                started = time.monotonic()
                data = next(upcoming)
                data_seconds = time.monotonic() - started
                rate = learning_rate(self.state.step, self.optim, total)
                profiler.before(self.state.step + 1)
                result = train_step(data.micro_batches, rate, stop.reason is not None)
                profiler.after(self.state.step + 1)
                seconds = time.monotonic() - started
                skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
                self._advance(data, result, seconds)
                speed = self.speed.step(data, result.count, seconds, data_seconds)
                if self._is_due(self.trainer.log_interval):
                    writer.write(self.state.step, self._report(result, rate) | speed)
                meter.advance(note=f"loss {result.metrics['loss']:.4f}")
                self._check_finite(skipped_in_a_row, data, result)
                if self.validation is not None and self._is_due(self.trainer.eval_interval):
                    self._validate(writer)
                stop.expect(2 * seconds)
                if result.stop or self._is_due(self.trainer.save_interval):
                    self._save()
                if result.stop and self.state.step < total:
                    reason = stop.reason or "a request to another rank"
                    raise StoppedEarly(
                        f"stopped by {reason} after step {self.state.step} of {total}, saved: run it again"
                    )
        return self.state

    def _continue(self) -> None:
        newest = self.ranks.broadcast(checkpoint.newest(self.run_dir))
        if newest is None:
            return
        saved = checkpoint.read_state(newest)
        if saved.settings != self.settings:
            raise ConfigError(
                f"run.dir={self.run_dir}: holds a run with other settings, weights or data; "
                "repeat its command to continue it, or give another folder"
            )
        self.state = checkpoint.load(self.module, self.optimizer, newest, self.ranks)
        logger.info("continuing after step %d of %d", self.state.step, self.data.total_steps)

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens now."""
        at_end = self.state.step == self.data.total_steps
        return at_end or (interval is not None and self.state.step % interval == 0)

    def _advance(self, data: StepData, result: StepResult, seconds: float) -> None:
        self.state.step += 1
        self.state.consumed_samples += data.num_rows
        self.state.skipped_steps += not result.applied
        self.state.seconds += seconds

    def _report(self, result: StepResult, rate: float) -> dict[str, Any]:
        """Return what a step did, for its line of `metrics.jsonl`."""
        return {
            **result.metrics,
            "count": result.count,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "consumed_samples": self.state.consumed_samples,
            "skipped_steps": self.state.skipped_steps,
        }

    def _check_finite(self, in_a_row: int, data: StepData, result: StepResult) -> None:
        if result.applied:
            return
        own = sorted({i for b in data.micro_batches for i in b.row_ids})
        rows = sorted({i for part in self.ranks.gather(own) for i in part})
        logger.warning(
            "step %d skipped on all ranks: loss %s, gradient norm %s; rows %s",
            self.state.step,
            result.metrics["loss"],
            result.grad_norm,
            ", ".join(rows[:8]) + (" ..." if len(rows) > 8 else ""),
        )
        if in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise AlignError(
                f"{in_a_row} steps in a row were not finite, the last one at step {self.state.step}: "
                "lower optim.lr or look at the rows named above; checkpoints before them are kept"
            )

    def _validate(self, writer: MetricsWriter) -> None:
        assert self.validation is not None
        metrics, count = evaluate(self.model, self.objective, self._validation_batches(), self.ranks.device)
        writer.write(self.state.step, {f"valid_{n}": v for n, v in metrics.items()} | {"valid_count": count})
        shown = ", ".join(f"{n} {v:.4f}" for n, v in metrics.items())
        logger.info("validation after step %d: %s", self.state.step, shown)
        if self.state.best_value is None or metrics["loss"] < self.state.best_value:
            self.state.best_value, self.state.best_step = metrics["loss"], self.state.step
            self._save()

    def _validation_batches(self) -> Iterator[list[PackedBatch]]:
        assert self.validation is not None
        for data in self.validation.in_order(_VALIDATION_ROWS * self.ranks.dp_size):
            yield data.micro_batches

    def _save(self) -> None:
        folder = checkpoint.step_folder(self.run_dir, self.state.step)
        if self.ranks.broadcast((folder / checkpoint.FILES_NAME).is_file()):
            return
        self.state.settings = self.settings
        with weights_in_place(self.model):
            checkpoint.save(
                self.run_dir,
                self.module,
                self.optimizer,
                self.description,
                self.tokenizer,
                self.state,
                self.ranks,
            )
        if self.ranks.is_main:
            if self.state.best_step == self.state.step:
                checkpoint.link(folder, "best")
            checkpoint.prune(self.run_dir, self.trainer.keep_checkpoints, {self.state.best_step})
        self.ranks.barrier()
