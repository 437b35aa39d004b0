"""Saving of checkpoints, either blocking or in a background thread.

A save has three phases:

1. All ranks plan the save and collect their tensors.
2. Each rank writes, syncs and hashes its shards, in a thread if asked to.
3. The ranks agree that all writes succeeded. Then rank 0 adds the small files and, last,
   `checkpoint.json`, syncs them, and renames the folder.

The folder has a hidden name until that rename, so nothing mistakes an incomplete save for a checkpoint.
"""

import contextlib
import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from offline_align.data.tokenizer import Tokenizer
from offline_align.distributed.setup import Ranks
from offline_align.errors import AlignError, StorageError
from offline_align.lineage.effort import part
from offline_align.lineage.files import fsync_path
from offline_align.model.description import ModelDescription
from offline_align.progress import LARGE_BYTES, announced
from offline_align.train import checkpoint, optimizer_state
from offline_align.train.checkpoint import TrainState
from offline_align.wording import counted, duration

logger = logging.getLogger(__name__)
# Bytes per parameter of the fp32 main weight and two moments.
_OPTIMIZER_BYTES = 12


@dataclass
class _PendingSave:
    """This rank's part of a save that has begun and is not complete."""

    folder: Path
    """The hidden folder that is written."""
    state: TrainState
    """The training state when the save was requested."""
    request: Any
    """Megatron's AsyncRequest: its result queue and the functions that finalise a save."""
    buckets: list[Any]
    """The files of this rank, each with its tensors in CPU memory."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and hash of the files that this rank has written."""
    error: StorageError | None = None
    thread: threading.Thread | None = None
    started: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Write, sync and hash the shards of this rank.

        A StorageError is kept in `error` until `Saver.finish` shares it with all ranks.
        """
        try:
            with _storage_errors(self.folder):
                written = {i: self._write(i, bucket) for i, bucket in enumerate(self.buckets)}
                self.entries = {name: checkpoint.entry(Path(path)) for path, name, _ in self.buckets}
        except StorageError as error:
            self.error = error
        else:
            if self.buckets:
                self.request.async_fn_args[2].put(written)
        self.buckets = []

    def _write(self, number: int, bucket: Any) -> Any:
        """Write and sync one file in megatron's format.

        This replaces megatron's own loop over the files, which loses the error of a failed write.
        """
        transforms = self.request.async_fn.args[0]
        _, written = FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, None, None, use_fsync=True)
        if isinstance(written, RuntimeError):
            # torch's archive writer reports a failed write as a RuntimeError.
            raise StorageError(f"{bucket[0]}: cannot be written: {str(written).splitlines()[0]}") from written
        if isinstance(written, Exception):
            raise written
        return written


@dataclass
class Saver:
    """Saves the checkpoints of a run, one at a time. All ranks must call its methods together.

    If a write fails on any rank, all ranks end with the exit code of StorageError, and earlier
    checkpoints are untouched.
    """

    run_dir: Path
    model: nn.Module
    optimizer: MegatronOptimizer | None
    description: ModelDescription
    tokenizer: Tokenizer
    ranks: Ranks
    keep: int = 1
    """Number of newest checkpoints that are kept in addition to the best one."""
    in_background: bool = False
    """Whether a thread writes the shards while training continues. This needs CPU memory for a copy."""
    seconds: float = 0.0
    """Duration of the last save, from the request until the folder was renamed."""
    _pending: _PendingSave | None = None

    def save(self, state: TrainState) -> None:
        """Save the current weights, optimizer state and `state`.

        A save in the background returns once the tensors are copied. A pending save is finished first.
        """
        self.finish()
        if self.in_background:
            self._pending = save = self._begin(replace(state))
            save.thread = threading.Thread(target=save.write, name="save", daemon=True)
            save.thread.start()
            return
        with announced(f"saving a checkpoint after step {state.step}", self._size, self.ranks.is_main):
            self._pending = save = self._begin(replace(state))
            save.write()
            self.finish()

    def poll(self) -> None:
        """Complete a save in the background if all ranks have written their shards, without waiting."""
        thread = self._pending.thread if self._pending is not None else None
        if thread is not None and not self.ranks.any_rank(thread.is_alive())():
            self.finish()

    @part("saves")
    def finish(self) -> None:
        """Wait for the pending save, if there is one, and complete it. Raises StorageError."""
        save, self._pending = self._pending, None
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        try:
            self._raise_first_error(save.error)
            with _storage_errors(save.folder):
                for collect in save.request.finalize_fns:
                    collect()
            entries = {n: e for part in self.ranks.gather(save.entries) for n, e in part.items()}
            self._on_main(save.folder, lambda: self._commit(save, entries))
        except AlignError:
            if self.ranks.is_main:
                shutil.rmtree(save.folder, ignore_errors=True)
            raise
        self.update_links_and_prune(save.state)
        self.seconds = time.monotonic() - save.started
        if save.thread is not None and self.ranks.is_main and self._size >= LARGE_BYTES:
            logger.info(
                "checkpoint after step %d: saved in the background in %s", save.state.step, duration(self.seconds)
            )

    def update_links_and_prune(self, state: TrainState) -> None:
        """Set the links and delete old checkpoints, given the `state` of the newest checkpoint."""
        self._on_main(
            self.run_dir / checkpoint.FOLDER,
            lambda: checkpoint.update_links_and_prune(self.run_dir, state, self.keep),
        )

    def _begin(self, state: TrainState) -> _PendingSave:
        folder = self.ranks.broadcast(checkpoint.temporary(checkpoint.step_folder(self.run_dir, state.step)))
        self._on_main(folder, lambda: folder.mkdir(parents=True))
        with _storage_errors(folder):
            request = self._plan(folder)
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        # Training on the CPU updates the same memory, so a background save needs a copy. Tensors of
        # a GPU are copied to the CPU anyway.
        copied = self.in_background and self.ranks.device.type == "cpu"
        return _PendingSave(folder, state, request, [_on_cpu(bucket, copied) for bucket in buckets])

    def _plan(self, folder: Path) -> Any:
        # By default, megatron starts a manager process for this queue. The writers here are threads of
        # this process, so a plain queue is enough.
        filesystem_async._results_queue = queue.Queue()
        shards = checkpoint.sharded_weights(self.model)
        if self.optimizer is not None:
            shards["optimizer"] = optimizer_state.to_save(self.optimizer, shards)
        # Data parallel ranks share the writing of tensors that all of them hold.
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), everyone)
        form = dict(optimizer_state.FORM)
        return dist_checkpointing.save(
            shards, str(folder), strategy, async_sharded_save=True, async_strategy="mcore", content_metadata=form
        )

    def _commit(self, save: _PendingSave, entries: dict[str, dict[str, Any]]) -> None:
        """Add the small files and the manifest, and rename the folder to its final name.

        `entries` are the manifest entries of the shards, which are already on disk.
        """
        folder, final = save.folder, checkpoint.step_folder(self.run_dir, save.state.step)
        self.description.save(folder)
        self.tokenizer.save(folder / "tokenizer")
        (folder / checkpoint.STATE_NAME).write_text(json.dumps(asdict(save.state), indent=2) + "\n")
        small = [p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)) not in entries]
        entries = entries | {str(p.relative_to(folder)): checkpoint.entry(p) for p in small}
        manifest = folder / checkpoint.FILES_NAME
        manifest.write_text(checkpoint.manifest_text(dict(sorted(entries.items()))))
        for path in (*small, manifest, folder / "tokenizer", folder):
            fsync_path(path)
        _rename(folder, final)

    def check_space(self, steps_left: int, interval: int | None, keeps_best: bool) -> None:
        """Raise StorageError if the disk has no room for the checkpoints that the run keeps at once."""
        self.ranks.from_main(lambda: self._check_space(steps_left, interval, keeps_best))

    def _check_space(self, steps_left: int, interval: int | None, keeps_best: bool) -> None:
        there = len(list((self.run_dir / checkpoint.FOLDER).glob("step_*")))
        to_come = -(-steps_left // interval) if interval else min(steps_left, 1)
        # While a checkpoint is written, one more exists than is kept.
        more = min(to_come, max(1, self.keep + 1 + keeps_best - there))
        size, free = self.bytes_estimate(), shutil.disk_usage(self.run_dir).free
        if more * size > free:
            raise StorageError(
                f"run.dir={self.run_dir}: {free / 1e9:.3g} GB are free, and {counted(more, 'more checkpoint')} of "
                f"about {size / 1e9:.3g} GB are to come: make room, or lower trainer.keep_checkpoints={self.keep}"
            )

    @cached_property
    def _size(self) -> int:
        return self.bytes_estimate()

    def bytes_estimate(self) -> int:
        """Estimate the bytes of a checkpoint: weights, and fp32 main weights and moments if there are any."""
        more = _OPTIMIZER_BYTES if self.optimizer is not None else 0
        own = sum(p.numel() * (p.element_size() + more) for p in self.model.parameters())
        return own * self.ranks.tp_size

    def _raise_first_error(self, own: StorageError | None) -> None:
        """Raise an error on all ranks if any rank has one."""
        found = [str(error) for error in self.ranks.gather(own) if error is not None]
        if found:
            raise checkpoint.error_for_all_ranks(found[0], self.ranks)

    def _on_main(self, folder: Path, work: Callable[[], None]) -> None:
        """Run `work` on rank 0 while the others wait. Its error ends all ranks."""

        def guarded() -> None:
            with _storage_errors(folder):
                work()

        self.ranks.from_main(guarded)


def _on_cpu(bucket: Any, copied: bool) -> Any:
    """Return a file's name and content with all tensors on the CPU; `copied` forces a copy."""
    path, name, (objects, tensors) = bucket
    return path, name, (objects, [(item, tensor.detach().to("cpu", copy=copied)) for item, tensor in tensors])


def _rename(folder: Path, final: Path) -> None:
    old = checkpoint.temporary(final)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: cannot save the checkpoint: {error.strerror or error}"
        ) from error
