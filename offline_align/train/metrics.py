"""Metrics of a run: one JSON object a logged step, and TensorBoard beside it. Written by one rank."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from offline_align.lineage.files import write_atomically

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run folder; does nothing where `enabled` is False.

    `first_step` is the first that will be written. Where the validation after the step before is done again too
    (`validation_due`), its line is forgotten.
    """

    def __init__(self, run_dir: Path, enabled: bool, first_step: int, validation_due: bool = False) -> None:
        self._file = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / FILE_NAME
        _drop_steps_from(path, first_step, validation_due)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the values of `step` (optimizer steps done)."""
        if self._file is None:
            return
        # JSON has no NaN: null keeps the line readable by anything.
        row = {"step": step, **{k: _finite(v) for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Bring all lines to disk, so that no checkpoint is ahead of them."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_steps_from(path: Path, first_step: int, validation_due: bool) -> None:
    """Forget lines of steps that are about to be done again: a run killed after its last checkpoint wrote them."""
    if not path.is_file():
        return
    kept = [line for line in path.read_bytes().splitlines() if _stays(line, first_step, validation_due)]
    write_atomically(path, b"".join(line + b"\n" for line in kept))


def _stays(line: bytes, first_step: int, validation_due: bool) -> bool:
    try:
        row = json.loads(line)
        return bool(row["step"] < first_step - (validation_due and "valid_count" in row))
    except (ValueError, LookupError, TypeError):
        return False  # a kill tore the last line
