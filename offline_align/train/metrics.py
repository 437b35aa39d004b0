"""Metrics of a run: `metrics.jsonl`, TensorBoard and, on request, Weights & Biases; written by one rank."""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from offline_align import tensorboard_writer
from offline_align.errors import StorageError
from offline_align.lineage.files import write_atomically

FILE_NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and `tensorboard/` of a run folder.

    Does nothing if `enabled` is False. `first_step` is the first step that will be written; lines of
    this and later steps are dropped from an existing file. With `validation_due`, the validation after
    the step before is repeated too, so its line is dropped as well. `wandb_project` names the
    Weights & Biases project that gets the same numbers.
    """

    def __init__(
        self,
        run_dir: Path,
        enabled: bool,
        first_step: int,
        validation_due: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        self._file = None
        self._board: Any = None
        self._thread = contextlib.ExitStack()
        self._wandb: Any = None
        self._path = run_dir / FILE_NAME
        if not enabled:
            return
        _drop_steps_from(self._path, first_step, validation_due)
        with self._storage_errors():
            self._file = self._path.open("a", encoding="utf-8")
        self._open_board(run_dir / tensorboard_writer.FOLDER, first_step)
        if wandb_project is not None:
            import wandb

            # The client reads its API key from the environment, so the key is not stored. The id
            # depends on the folder, so a resumed run continues its record.
            run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=wandb_project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow"
            )

    def _open_board(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._thread.enter_context(tensorboard_writer.silent_writer_thread())
        with self._without_board():
            self._board = SummaryWriter(str(folder), purge_step=first_step)

    @contextlib.contextmanager
    def _without_board(self) -> Iterator[None]:
        """Continue without TensorBoard if its file cannot be written; `metrics.jsonl` has the same numbers."""
        try:
            yield
        except OSError as error:
            self._board = None
            logger.warning("tensorboard: cannot be written and is turned off: %s", error.strerror or error)

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is None:
            return
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            with self._without_board():
                self._board.close()
        self._thread.close()
        # After a failed write, closing flushes the rest of the buffer and fails again. That error must
        # not hide the one that is being raised.
        with contextlib.suppress(OSError) if error is not None else self._storage_errors():
            self._file.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the metrics of `step`, the number of optimizer steps done. Raises StorageError."""
        if self._file is None:
            return
        # JSON has no NaN, so a value that is not finite becomes null.
        row = {"step": step, **{k: _finite(v) for k, v in values.items()}}
        with self._storage_errors():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=step)
        with self._without_board():
            for name, value in values.items():
                if self._board is not None and isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Sync all lines to disk, so that no checkpoint is ahead of them. Raises StorageError."""
        if self._file is not None:
            with self._storage_errors():
                os.fsync(self._file.fileno())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_steps_from(path: Path, first_step: int, validation_due: bool) -> None:
    """Drop the lines of steps that are repeated, which a run wrote after its last checkpoint."""
    if not path.is_file():
        return
    kept = [line for line in path.read_bytes().splitlines() if _stays(line, first_step, validation_due)]
    write_atomically(path, b"".join(line + b"\n" for line in kept))


def _stays(line: bytes, first_step: int, validation_due: bool) -> bool:
    try:
        row = json.loads(line)
        return bool(row["step"] < first_step - (validation_due and "valid_count" in row))
    except (ValueError, LookupError, TypeError):
        return False  # the last line is incomplete if the run was killed while writing it
