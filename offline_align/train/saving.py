"""Saving: the one way that a checkpoint comes into being, at once or beside the training.

A save has three parts. All ranks plan it and take hold of their tensors; each writes, syncs and hashes its shards, in
a thread if wanted; all agree that this went well, and rank 0 adds the small files and, last, `checkpoint.json`, syncs
them and renames the folder. Until then nothing takes the folder for a checkpoint.
"""

import contextlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
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
from offline_align.train import checkpoint, optimizer_state
from offline_align.train.checkpoint import TrainState

# fp32 main weights and two moments.
_OPTIMIZER_BYTES = 12


@dataclass
class _Save:
    """A save under way, as this rank sees it."""

    folder: Path
    """Where it is written."""
    state: TrainState
    """The state at the request."""
    request: Any
    """Megatron's AsyncRequest: the results it waits for, and the functions that end a save."""
    buckets: list[Any]
    """Files of this rank, each with its tensors in memory of the CPU."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and hash of the files that this rank has written."""
    error: StorageError | None = None
    thread: threading.Thread | None = None
    started: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Write, sync and hash the shards of this rank; an error of the storage waits for all ranks to hear of it."""
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
        """Write one file in megatron's form, synced; megatron's own loop over the files would lose the error."""
        transforms = self.request.async_fn.args[0]
        _, written = FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, None, None, use_fsync=True)
        if isinstance(written, RuntimeError):
            # How torch's archive writer takes a write that failed.
            raise StorageError(f"{bucket[0]}: cannot be written: {str(written).splitlines()[0]}") from written
        if isinstance(written, Exception):
            raise written
        return written


@dataclass
class Saver:
    """Saves the checkpoints of a run, one at a time; all ranks call its methods together.

    Where a write fails, all ranks end with the exit code of StorageError, and what was there before is untouched.
    """

    run_dir: Path
    model: nn.Module
    optimizer: MegatronOptimizer | None
    description: ModelDescription
    tokenizer: Tokenizer
    ranks: Ranks
    keep: int = 1
    """Newest checkpoints that stay, beside the best one."""
    in_background: bool = False
    """Whether a thread writes the shards while the training goes on; takes the memory of a copy of them."""
    seconds: float = 0.0
    """How long the last save has taken, from the request until it was there."""
    _under_way: _Save | None = None

    def save(self, state: TrainState) -> None:
        """Save weights, moments and `state` as they are now.

        In the background it returns once they are copied; a save that is still under way is finished before.
        """
        self.finish()
        self._under_way = save = self._begin(replace(state))
        if self.in_background:
            save.thread = threading.Thread(target=save.write, name="save", daemon=True)
            save.thread.start()
        else:
            save.write()
            self.finish()

    def poll(self) -> None:
        """Let a save in the background appear if all ranks have written their shards; do not wait for it."""
        thread = self._under_way.thread if self._under_way is not None else None
        if thread is not None and not self.ranks.any_rank(thread.is_alive())():
            self.finish()

    @part("saves")
    def finish(self) -> None:
        """Wait for the save under way, if there is one, and let it appear."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        try:
            self._agree(save.error)
            with _storage_errors(save.folder):
                for collect in save.request.finalize_fns:
                    collect()
            entries = {n: e for part in self.ranks.gather(save.entries) for n, e in part.items()}
            self._on_main(save.folder, lambda: self._commit(save, entries))
        except AlignError:
            if self.ranks.is_main:
                shutil.rmtree(save.folder, ignore_errors=True)
            raise
        self.settle(save.state)
        self.seconds = time.monotonic() - save.started

    def settle(self, state: TrainState) -> None:
        """Set the links, and delete what is old, for `state`, that of the newest checkpoint."""
        self._on_main(self.run_dir / checkpoint.FOLDER, lambda: checkpoint.settle(self.run_dir, state, self.keep))

    def _begin(self, state: TrainState) -> _Save:
        folder = self.ranks.broadcast(checkpoint.temporary(checkpoint.step_folder(self.run_dir, state.step)))
        self._on_main(folder, lambda: folder.mkdir(parents=True))
        with _storage_errors(folder):
            request = self._plan(folder)
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        # What comes from a GPU is a copy by then.
        copied = self.in_background and self.ranks.device.type == "cpu"
        return _Save(folder, state, request, [_on_cpu(bucket, copied) for bucket in buckets])

    def _plan(self, folder: Path) -> Any:
        # Its writers are threads of this process; only their result queue would start a manager process.
        filesystem_async._results_queue = queue.Queue()
        shards = checkpoint.sharded_weights(self.model)
        if self.optimizer is not None:
            shards["optimizer"] = optimizer_state.to_save(self.optimizer, shards)
        # What data parallel ranks hold alike is divided among them.
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), everyone)
        form = dict(optimizer_state.FORM)
        return dist_checkpointing.save(
            shards, str(folder), strategy, async_sharded_save=True, async_strategy="mcore", content_metadata=form
        )

    def _commit(self, save: _Save, entries: dict[str, dict[str, Any]]) -> None:
        """Complete the folder and give it its name; `entries` are those of the shards, which are on disk."""
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
        """Raise StorageError where the disk has no room for the checkpoints that the run will hold at once."""
        self.ranks.from_main(lambda: self._check_space(steps_left, interval, keeps_best))

    def _check_space(self, steps_left: int, interval: int | None, keeps_best: bool) -> None:
        there = len(list((self.run_dir / checkpoint.FOLDER).glob("step_*")))
        to_come = -(-steps_left // interval) if interval else min(steps_left, 1)
        # One more than is kept, while the newest is being written.
        more = min(to_come, max(1, self.keep + 1 + keeps_best - there))
        size, free = self.bytes_estimate(), shutil.disk_usage(self.run_dir).free
        if more * size > free:
            raise StorageError(
                f"run.dir={self.run_dir}: {free / 1e9:.3g} GB are free, and {more} more checkpoints of about "
                f"{size / 1e9:.3g} GB are to come: make room, or lower trainer.keep_checkpoints={self.keep}"
            )

    def bytes_estimate(self) -> int:
        """Return about how many bytes a checkpoint takes: weights as they are, and fp32 copies and moments."""
        more = _OPTIMIZER_BYTES if self.optimizer is not None else 0
        own = sum(p.numel() * (p.element_size() + more) for p in self.model.parameters())
        return own * self.ranks.tp_size

    def _agree(self, own: StorageError | None) -> None:
        """End all ranks where one has met an error."""
        found = [str(error) for error in self.ranks.gather(own) if error is not None]
        if found:
            raise checkpoint.refusal(found[0], self.ranks)

    def _on_main(self, folder: Path, work: Callable[[], None]) -> None:
        """Let rank 0 work on the disk while the others wait; its error ends all."""

        def guarded() -> None:
            with _storage_errors(folder):
                work()

        self.ranks.from_main(guarded)


def _on_cpu(bucket: Any, copied: bool) -> Any:
    """Return the file of a rank with its tensors on the CPU; copies, where training goes on beside the save."""
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
    """Turn errors of the operating system into StorageError, with the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: cannot save the checkpoint: {error.strerror or error}"
        ) from error
