"""The training loop for all objectives: steps, validation, checkpoints, early stops and resuming."""

import logging
import math
import os
import socket
import time
from collections.abc import Generator
from contextlib import closing
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
from offline_align.lineage.effort import part
from offline_align.model.description import ModelDescription
from offline_align.objectives import Objective
from offline_align.progress import Meter, announced
from offline_align.train import checkpoint
from offline_align.train.checkpoint import TrainState
from offline_align.train.first_step import FirstStep
from offline_align.train.metrics import MetricsWriter
from offline_align.train.optim import learning_rate
from offline_align.train.profiling import StepProfiler
from offline_align.train.saving import Saver
from offline_align.train.speed import SpeedMeter, stragglers
from offline_align.train.step import StepResult, TrainStep, evaluate, weights_in_place

logger = logging.getLogger(__name__)
# Number of rows per data parallel rank that validation packs and evaluates at a time: enough to
# fill the bins, and few enough that a stop request, which is checked in between, is answered soon.
_VALIDATION_ROWS = 256
_MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Trainer:
    """The parts of a training run; `fit` trains until the last step or until a stop request."""

    run_dir: Path
    trainer: TrainerSection
    optim: OptimSection
    ranks: Ranks
    module: nn.Module
    """The unwrapped model."""
    model: DistributedDataParallel
    """The same model in megatron's data parallel wrapper."""
    optimizer: MegatronOptimizer
    objective: Objective
    data: Loader
    validation: Loader | None
    description: ModelDescription
    tokenizer: Tokenizer
    speed: SpeedMeter
    settings: str
    """Hash of all settings and data that the steps depend on. A checkpoint with another hash is refused."""
    state: TrainState = field(default_factory=TrainState)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        """Build the saver for this model and optimizer."""
        self.saver = Saver(
            self.run_dir,
            self.module,
            self.optimizer,
            self.description,
            self.tokenizer,
            self.ranks,
            self.trainer.keep_checkpoints,
            self.trainer.async_save,
        )

    def fit(self, stop: StopRequest) -> TrainState:
        """Train until the last step and return the state.

        Training resumes from the newest intact checkpoint of the run folder.

        Raises StoppedEarly, after saving a checkpoint, if a stop is requested; ConfigError if the
        checkpoint belongs to other settings; StorageError if checkpoints exist and none is intact, or
        if the disk has no space for the remaining checkpoints; and AlignError if the loss or gradient
        norm is not finite in three steps in a row.
        """
        self._resume()
        train_step = TrainStep(self.model, self.optimizer, self.objective, self.optim.clip_grad)
        total = self.data.total_steps
        main = self.ranks.is_main
        self.saver.check_space(total - self.state.step, self.trainer.save_interval, self.validation is not None)
        # Slurm's name for the node is preferred. It can differ from the host name.
        hosts = self.ranks.gather(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
        with (
            part("steps"),
            MetricsWriter(
                self.run_dir, main, self.state.step + 1, self.state.validation_due, self.trainer.wandb_project
            ) as writer,
            Meter("training", total, "steps", self.state.step, main) as meter,
            StepProfiler(self.trainer.profile_steps, self.run_dir, self.ranks.rank) as profiler,
        ):
            if self.state.validation_due:
                with meter.paused():
                    self._validate(writer, None)
                self.saver.update_links_and_prune(self.state)
            upcoming = self.data.steps(self.state.step, self._pinned)
            while self.state.step < total:
                started = time.monotonic()
                data = next(upcoming)
                data_seconds = time.monotonic() - started
                rate = learning_rate(self.state.step, self.optim, total)
                profiler.before(self.state.step + 1)
                stop.doing = f"step {self.state.step + 1}, then saving a checkpoint"
                train_step.before_micro_batch = self._first_step(data) if main and not meter.has_begun else None
                result = train_step(data.micro_batches, rate, lambda: stop.reason is not None, data_seconds)
                profiler.after(self.state.step + 1)
                seconds = time.monotonic() - started
                self._advance(data, result, seconds)
                speed = self.speed.step(data, seconds, data_seconds)
                if self._is_due(self.trainer.log_interval):
                    slow = stragglers(result.rank_seconds, hosts)
                    writer.write(self.state.step, self._report(result, rate) | speed | slow)
                tokens = f"{speed['tokens_per_second']:,.0f} tokens/s"
                meter.advance(note=f"{tokens}, loss {result.metrics['loss']:.4f}")
                self._check_finite(data, result)
                self.state.validation_due = self.validation is not None and self._is_due(self.trainer.eval_interval)
                if self.state.validation_due and not result.stop:
                    stop.doing = "some rows of the validation, then saving a checkpoint"
                    with meter.paused():
                        self._validate(writer, stop)
                stop.expect(2 * seconds + self.saver.seconds)
                is_best = self.state.best_step == self.state.step
                if result.stop or is_best or self._is_due(self.trainer.save_interval):
                    with meter.paused():
                        self._save(writer)
                if result.stop and (self.state.step < total or self.state.validation_due):
                    raise self._stopped(stop)
                self.saver.poll()
            self.saver.finish()
        return self.state

    def _first_step(self, data: StepData) -> FirstStep:
        sizes = [batch.tokens.numel() for batch in data.micro_batches]
        return FirstStep(self.state.step + 1, self.data.total_steps, data.num_rows, sizes, self._pinned)

    @property
    def _pinned(self) -> bool:
        """Whether batches use pinned memory, which allows asynchronous copies to the GPU."""
        return self.ranks.device.type == "cuda"

    def _stopped(self, stop: StopRequest) -> StoppedEarly:
        """Wait for the save to complete and return the error that ends a stopped run."""
        self.saver.finish()
        reason = stop.reason or "a request to another rank"
        return StoppedEarly(
            f"stopped by {reason} after step {self.state.step} of {self.data.total_steps}; a checkpoint is saved: "
            "run the same command to continue"
        )

    @part("load")
    def _resume(self) -> None:
        newest = checkpoint.newest_whole(self.run_dir, self.ranks)
        if newest is None:
            return
        saved = checkpoint.read_state(newest)
        if saved.settings != self.settings:
            raise ConfigError(
                f"run.dir={self.run_dir}: has a checkpoint of a run with other settings, weights or data; "
                "repeat the command of that run to continue it, or give another folder"
            )
        self.state = checkpoint.load(self.module, self.optimizer, newest)
        # The previous attempt may have been killed between writing a checkpoint and setting its links.
        self.saver.update_links_and_prune(self.state)
        logger.info("training: continuing after step %d of %d", self.state.step, self.data.total_steps)

    def _is_due(self, interval: int | None) -> bool:
        """Return whether an action that is due every `interval` steps, and at the end, is due now."""
        at_end = self.state.step == self.data.total_steps
        return at_end or (interval is not None and self.state.step % interval == 0)

    def _advance(self, data: StepData, result: StepResult, seconds: float) -> None:
        self.state.step += 1
        self.state.consumed_samples += data.num_rows
        self.state.skipped_steps += not result.applied
        self.state.skipped_in_a_row = 0 if result.applied else self.state.skipped_in_a_row + 1
        self.state.seconds += seconds

    def _report(self, result: StepResult, rate: float) -> dict[str, Any]:
        """Return the metrics of a step for its line of `metrics.jsonl`."""
        return {
            **result.metrics,
            "count": result.count,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "consumed_samples": self.state.consumed_samples,
            "skipped_steps": self.state.skipped_steps,
        }

    def _check_finite(self, data: StepData, result: StepResult) -> None:
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
        if self.state.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            self.saver.finish()
            raise AlignError(
                f"{self.state.skipped_in_a_row} steps in a row were not finite, up to step {self.state.step}: "
                "lower optim.lr, or look at the rows that the log names; earlier checkpoints are kept"
            )

    @part("validation")
    def _validate(self, writer: MetricsWriter, stop: StopRequest | None) -> None:
        """Evaluate the validation set, log its metrics and update the best step.

        If a stop is requested during the validation, saves a checkpoint that marks the validation as
        due and raises StoppedEarly. If `stop` is None, stop requests are ignored: a validation that was
        interrupted once must complete in the next attempt, or short attempts would never get past it.
        """
        try:
            said = announced(f"validation after step {self.state.step}", enabled=self.ranks.is_main)
            with closing(self._validation_batches(stop)) as batches, said:
                metrics, count = evaluate(self.model, self.objective, batches, self.ranks.device)
        except StoppedEarly:
            self._save(writer)
            self.saver.finish()
            raise
        writer.write(self.state.step, {f"valid_{n}": v for n, v in metrics.items()} | {"valid_count": count})
        shown = ", ".join(f"{n} {v:.4f}" for n, v in metrics.items())
        logger.info("validation after step %d: %s", self.state.step, shown)
        self.state.validation_due = False
        if not math.isfinite(metrics["loss"]):
            logger.warning(
                "validation after step %d: the loss is not finite; its checkpoint cannot be `best`", self.state.step
            )
        elif self.state.best_value is None or metrics["loss"] < self.state.best_value:
            self.state.best_value, self.state.best_step = metrics["loss"], self.state.step

    def _validation_batches(self, stop: StopRequest | None) -> Generator[list[PackedBatch]]:
        assert self.validation is not None
        with closing(self.validation.in_order(_VALIDATION_ROWS * self.ranks.dp_size, self._pinned)) as upcoming:
            for data in upcoming:
                started = time.monotonic()
                # Reading the vote waits until the previous rows are evaluated, so the time from
                # `started` until after the yield is that of one set of rows.
                if stop is not None and self.ranks.any_rank(stop.reason is not None)():
                    raise self._stopped(stop)
                yield data.micro_batches
                if stop is not None:
                    stop.expect(2 * (time.monotonic() - started) + self.saver.seconds)

    @part("saves")
    def _save(self, writer: MetricsWriter) -> None:
        writer.sync()
        self.saver.finish()
        self.state.settings = self.settings
        if self.ranks.broadcast(checkpoint.step_folder(self.run_dir, self.state.step).is_dir()):
            self.saver.update_links_and_prune(self.state)
            return
        with weights_in_place(self.model):
            self.saver.save(self.state)
