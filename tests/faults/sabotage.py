"""Faults injected from inside a run, at exact places that a signal after some seconds would rarely hit."""

import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from benchmarks.checkpoints import use_megatrons_form
from offline_align.distributed.stopping import StopRequest
from offline_align.model.heads import RewardModel
from offline_align.train import checkpoint, saving, trainer
from offline_align.train.step import TrainStep


def at(place: str, number: int, signals: list[int], rank: int | None = None) -> None:
    """Send this process `signals` when it reaches `place` for the `number`-th time (from 1)."""
    if rank is not None and int(os.environ.get("RANK", "0")) != rank:
        return
    left = [number]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            for each in signals:
                os.kill(os.getpid(), each)
                _until_handled(each)

    _PATCHES[place](strike)


def _until_handled(number: int) -> None:
    """Wait until the main thread has handled a signal: of two pending ones it handles the lower number first."""
    request = getattr(signal.getsignal(number), "__self__", None)
    deadline = time.monotonic() + 20
    while isinstance(request, StopRequest) and request.reason is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _before(owner: Any, name: str) -> Callable[[Callable[[], None]], None]:
    def patch(strike: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def struck(*arguments: Any, **more: Any) -> Any:
            strike()
            return original(*arguments, **more)

        setattr(owner, name, struck)

    return patch


def _mid_shard(strike: Callable[[], None]) -> None:
    """Strike when only some tensors of a shard are in its file."""
    original, written = filesystem_async._write_item, [0]

    @functools.wraps(original)
    def item(transforms: Any, stream: Any, *arguments: Any, **more: Any) -> Any:
        if stream.tell() == 0:
            written[0] = 0
        written[0] += 1
        if written[0] == 5:
            stream.flush()
            strike()
        return original(transforms, stream, *arguments, **more)

    filesystem_async._write_item = item


def _before_latest(strike: Callable[[], None]) -> None:
    original = checkpoint.link

    def link(folder: Path, name: str) -> None:
        if name == "latest":
            strike()
        original(folder, name)

    checkpoint.link = link


def _during_delete(strike: Callable[[], None]) -> None:
    """Strike when half of the files of an old checkpoint are deleted."""
    original = shutil.rmtree

    def rmtree(path: Any, *arguments: Any, **more: Any) -> Any:
        if Path(path).name.startswith(".step_") and Path(path).exists():
            for file in sorted(p for p in Path(path).rglob("*") if p.is_file())[::2]:
                file.unlink()
            strike()
        return original(path, *arguments, **more)

    shutil.rmtree = rmtree  # type: ignore[assignment]


_PATCHES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before write": _before(saving._PendingSave, "write"),
    "mid-shard": _mid_shard,
    "before manifest": _before(checkpoint, "manifest_text"),
    "before rename": _before(saving, "_rename"),
    "before latest": _before_latest,
    "during delete": _during_delete,
    "step": _before(TrainStep, "_update"),
    "validation": _before(trainer, "evaluate"),
    "bin": _before(RewardModel, "forward"),
}


def not_finite(what: str, value: float, rank: int, first: int, steps: int) -> None:
    """Multiply the loss or gradient of one rank by `value` in `steps` optimizer steps from `first` (from 1)."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    original, call, now = TrainStep._forward_step, TrainStep.__call__, [0]

    def counted(self: TrainStep, *arguments: Any, **more: Any) -> Any:
        now[0] += 1
        return call(self, *arguments, **more)

    def forward_step(self: TrainStep, batches: Any, model: Any) -> tuple[Tensor, Any]:
        output, loss_func = original(self, batches, model)
        if not first <= now[0] < first + steps:
            return output, loss_func
        if what == "gradient":
            hook: Any = output.register_hook
            hook(lambda gradient: gradient * value)
            return output, loss_func

        def poisoned(output: Tensor) -> Any:
            total, count, report = loss_func(output)
            return total * value, count, report | {"loss": report["loss"] * value}

        return output, poisoned

    TrainStep.__call__ = counted  # type: ignore[method-assign]
    TrainStep._forward_step = forward_step  # type: ignore[method-assign]


def slow_shards(steps: int) -> None:
    """Delay the writing of a background save until `steps` more steps are done, or the trainer waits for it."""
    original, finish, update = saving._PendingSave.write, saving.Saver.finish, TrainStep._update
    done = threading.Semaphore(0)

    def write(self: Any) -> None:
        for _ in range(steps):
            done.acquire()
        original(self)

    def waited(self: Any) -> None:
        done.release(steps)
        finish(self)
        while done.acquire(blocking=False):
            pass

    def updated(self: Any, *arguments: Any) -> Any:
        result = update(self, *arguments)
        done.release()
        return result

    saving._PendingSave.write = write  # type: ignore[method-assign]
    saving.Saver.finish = waited  # type: ignore[method-assign]
    TrainStep._update = updated  # type: ignore[method-assign, assignment]


def weights_at_end(folder: str) -> None:
    """Make each rank write the hash of its own weights to `folder` when its training ends or fails."""
    original, rank = trainer.Trainer.fit, os.environ.get("RANK", "0")

    def fit(self: trainer.Trainer, *arguments: Any) -> Any:
        try:
            return original(self, *arguments)
        finally:
            seen = hashlib.sha256()
            for parameter in self.module.parameters():
                seen.update(parameter.detach().float().numpy().tobytes())
            (Path(folder) / f"weights_{rank}").write_text(seen.hexdigest())

    trainer.Trainer.fit = fit  # type: ignore[method-assign, assignment]


def not_finite_and_weights(folder: str, *poison: Any) -> None:
    """Apply `weights_at_end` and `not_finite`."""
    weights_at_end(folder)
    not_finite(*poison)


def built_from_engine(without_first_update: bool = False, attention: str = "unfused") -> None:
    """Build models from the layers of Transformer Engine, which `Forks` must have installed."""
    from tests.engine_on_cpu import build_from_its_layers

    build_from_its_layers(attention)
    if without_first_update:
        not_finite("gradient", float("nan"), rank=0, first=1, steps=1)


def updates_recorded(folder: str, from_engine: bool = False) -> None:
    """Make each rank write its updates to `folder`; `from_engine` uses Transformer Engine's layers."""
    from tests import updates

    if from_engine:
        built_from_engine()
    updates.record(folder)


def saves_send_no_tensors() -> None:
    """Make collectives of tensors fail while a save is planned.

    Collectives of objects still work, because torch calls its own references to these functions.
    """
    begin = saving.Saver._begin

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a save sends tensors")

    def alone(self: saving.Saver, *arguments: Any) -> Any:
        names = ("all_gather", "all_gather_into_tensor", "gather", "broadcast", "all_reduce")
        kept = {name: getattr(torch.distributed, name) for name in names}
        try:
            for name in names:
                setattr(torch.distributed, name, fail)
            return begin(self, *arguments)
        finally:
            for name, collective in kept.items():
                setattr(torch.distributed, name, collective)

    saver: Any = saving.Saver
    saver._begin = alone


def saved_again(run_dir: str, by_megatron: bool = False) -> None:
    """Save a loaded checkpoint at once into another run folder; `by_megatron` uses megatron's own format."""
    if by_megatron:
        use_megatrons_form()
    original = trainer.Trainer._resume

    def loaded(self: trainer.Trainer) -> None:
        original(self)
        copy = dataclasses.replace(self.saver, run_dir=Path(run_dir), in_background=False)
        copy.save(self.state)

    trainer.Trainer._resume = loaded  # type: ignore[method-assign]


def little_space(free_bytes: int) -> None:
    """Make the disk report `free_bytes` of free space."""
    saving.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free_bytes, free_bytes)  # type: ignore[attr-defined]
