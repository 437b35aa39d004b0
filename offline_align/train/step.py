"""One optimizer step, and the evaluation of a validation set.

Only this module calls megatron's schedule, and only this module divides a loss.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.objectives import LossSum, Objective
from offline_align.train.optim import multiply_gradients, set_rates
from offline_align.train.speed import OwnTime


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step, equal on all ranks."""

    metrics: dict[str, float]
    """`loss` and the objective's metrics, each divided by the count of the global batch."""
    count: int
    """Number of targets or pairs in the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """Whether the weights were updated; they are not if the loss or the norm is not finite."""
    stop: bool
    """Whether any rank was asked to stop."""
    rank_seconds: list[float]
    """Seconds of each rank's own work in the previous step (see `OwnTime`)."""


@dataclass(frozen=True)
class GlobalSums:
    """Sums over all ranks, the same on all of them."""

    means: dict[str, float]
    """Each sum divided by `count`."""
    count: int
    stop: bool
    """Whether any rank was asked to stop."""
    rank_seconds: list[float]
    """The `own_seconds` of each rank."""


def reduce_sums(
    sums: dict[str, Tensor], count: int, device: torch.device, stop: bool = False, own_seconds: float = 0.0
) -> GlobalSums:
    """Reduce sums, counts, stop requests and times over all ranks in one collective."""
    names = sorted(sums)
    seconds = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    seconds[dist.get_rank()].fill_(own_seconds)
    # `torch.full` fills on the device; a copy from the host would synchronise with it.
    counted = [torch.full((), float(n), dtype=torch.float64, device=device) for n in (count, stop)]
    vector = torch.cat([torch.stack([*(sums[n].double().to(device) for n in names), *counted]), seconds])
    dist.all_reduce(vector)
    values = vector.tolist()
    *totals, total, stops = values[: len(names) + len(counted)]
    # Tensor parallel ranks hold equal sums, so each value is counted once per rank of that group.
    copies = parallel_state.get_tensor_model_parallel_world_size()
    divisor = max(total, 1.0)
    means = {n: t / divisor for n, t in zip(names, totals, strict=True)}
    return GlobalSums(means, round(total / copies), stops > 0, values[len(names) + len(counted) :])


def _finish_gradients(own_time: OwnTime, model: list[Any], _: Tensor, **named: Any) -> None:
    """Reduce the gradients over all ranks. Without a token count, megatron does not divide them."""
    own_time.stop()
    finalize_model_grads(model, None, **named)


class TrainStep:
    """Forward, backward and update of one global batch."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        objective: Objective,
        clip_grad: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.clip_grad = clip_grad
        self.before_micro_batch: Callable[[int], None] | None = None
        """Called with the number of each micro-batch (from 0) before it is computed."""
        self._own_time = OwnTime(self.device)
        self._schedule = get_forward_backward_func()
        self._connect_schedule()

    def _connect_schedule(self) -> None:
        config = self.model.config
        # A bound method would create a reference cycle through the model's gradient hooks. Python's
        # garbage collector cannot see those, so the model would never be freed.
        config.finalize_model_grads_func = functools.partial(_finish_gradients, self._own_time)
        ddp = self.model.ddp_config
        if ddp.overlap_grad_reduce:
            config.no_sync_func = self.model.no_sync

    def __call__(
        self,
        micro_batches: list[PackedBatch],
        learning_rate: float,
        stops: Callable[[], bool] = lambda: False,
        waited: float = 0.0,
    ) -> StepResult:
        """Train on this rank's share of a global batch.

        Every data parallel rank must pass the same number of micro-batches. `stops` says whether this rank
        is asked to stop; it is called once the micro-batches are computed. `waited` is the time in
        seconds that this rank has waited for its rows.
        """
        own_seconds = self._own_time.seconds()
        self._own_time.start(waited)
        set_rates(self.optimizer, learning_rate)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        stored = self._schedule(
            forward_step_func=self._forward_step,
            data_iterator=self._announced(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        sums = reduce_sums(*_add_up(stored), self.device, stops(), own_seconds)
        grad_norm, applied = self._update(sums.count, math.isfinite(sums.means["loss"]))
        return StepResult(sums.means, sums.count, grad_norm, applied, sums.stop, sums.rank_seconds)

    def _announced(self, micro_batches: list[PackedBatch]) -> Iterator[PackedBatch]:
        for number, batch in enumerate(micro_batches):
            if self.before_micro_batch is not None:
                self.before_micro_batch(number)
            yield batch

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def _forward_step(self, batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.device)

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            result = self.objective(output, batch)
            count = torch.full((), result.count, dtype=torch.int, device=self.device)
            # Returning three values tells megatron that the loss is a sum, so that it does not divide
            # by the number of micro-batches.
            return result.total, count, _report(result)

        return model(batch), loss_func

    def _update(self, count: int, loss_is_finite: bool) -> tuple[float, bool]:
        """Divide the gradient of the summed loss by `count`, clip it and update the weights.

        Returns the norm before clipping and whether the weights were updated. They are not if the
        loss or the norm is not finite; all ranks decide the same.
        """
        self.optimizer.prepare_grads()
        # The norm is reduced over all ranks, so all of them decide the same.
        norm = float(self.optimizer.get_grad_norm()) / max(count, 1)
        if not (loss_is_finite and math.isfinite(norm)):
            return norm, False
        clipped = min(1.0, self.clip_grad / (norm + 1e-6)) if self.clip_grad > 0 else 1.0
        # One factor for division and clipping takes one pass over the gradients.
        multiply_gradients(self.optimizer, clipped / max(count, 1))
        self.optimizer.step_with_ready_grads()
        return norm, True


@contextmanager
def weights_in_place(model: DistributedDataParallel) -> Iterator[None]:
    """Complete the weights for use outside a training step, for validation and checkpoints.

    With `overlap_param_gather`, updated weights are gathered during the next forward pass and are
    incomplete until then.
    """
    if not model.ddp_config.overlap_param_gather:
        yield
        return
    model.disable_forward_pre_hook()
    try:
        yield
    finally:
        model.enable_forward_pre_hook()


def evaluate(
    model: DistributedDataParallel,
    objective: Objective,
    batches: Iterator[list[PackedBatch]],
    device: torch.device,
) -> tuple[dict[str, float], int]:
    """Return the means of the objective's metrics over all `batches` and their count.

    Both are the same on every rank.
    """
    model.eval()
    # The cached fp8 weights are from before the last update, so they must be cast again.
    model.set_is_first_microbatch()
    stored: list[dict[str, Any]] = []
    # `torch.inference_mode` does not work here: megatron and Transformer Engine keep buffers that are
    # created during this forward pass, and a later training step could not write to them.
    with weights_in_place(model), torch.no_grad():
        for share in batches:
            for batch in share:
                moved = batch.to(device)
                stored.append(_report(objective(model(moved), moved)))
    model.train()
    sums = reduce_sums(*_add_up(stored), device)
    return sums.means, sums.count


def _report(result: LossSum) -> dict[str, Any]:
    return {"count": result.count, "loss": result.total.detach(), **result.metrics}


def _add_up(stored: list[dict[str, Any]]) -> tuple[dict[str, Tensor], int]:
    """Return the sums over a rank's micro-batches and their count."""
    names = [n for n in stored[0] if n != "count"]
    return {n: torch.stack([s[n] for s in stored]).sum() for n in names}, sum(s["count"] for s in stored)
