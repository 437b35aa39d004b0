"""The store of token ids: one folder for each set of rows, written atomically and memory-mapped.

`tokens.arrow` is one Arrow record batch, so that every column is one flat array. `summary.json` has
its size and the rows that were left out. Several processes may request the same folder at once.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offline_align.errors import StorageError

KEPT, TRUNCATED, REFUSED = "kept", "truncated", "chat_template: "
"""Statuses of rows; the chat template's message follows `REFUSED`. Any other status is a reason to drop."""

TOKENS_FILE, SUMMARY_FILE = "tokens.arrow", "summary.json"


@dataclass(frozen=True)
class Responses:
    """Context and k-th response of each of n dialogues."""

    ids: npt.NDArray[np.int32]
    """[T] ids of all dialogues, concatenated."""
    lengths: npt.NDArray[np.int64]
    """[n] number of ids of each dialogue."""
    start: npt.NDArray[np.int32]
    """[n] position in each dialogue of its first target token."""


Fresh = tuple[list[str], list[Responses]]
"""The status of each row of a batch, and the k-th responses of the kept rows for each k."""


@dataclass(frozen=True)
class StoredTokens:
    """One folder of the store."""

    rows: list[int]
    """Index of each kept row in the input."""
    columns: dict[str, npt.NDArray[Any]]
    """`ids_k` [T], `offsets_k` [n + 1] and `start_k` [n] of the k-th response."""
    left_out: list[tuple[int, str]]
    """Index and status of each dropped row."""
    truncated: int
    """Number of rows whose prompt was truncated."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped rows by reason."""
        return dict(Counter(status.partition(":")[0] for _, status in self.left_out))

    @property
    def refused(self) -> list[tuple[int, str]]:
        """Index and message of the rows that the chat template refuses."""
        return [(row, status.removeprefix(REFUSED)) for row, status in self.left_out if status.startswith(REFUSED)]


def stored(folder: Path, tokenize: Callable[[], Iterable[Fresh]]) -> StoredTokens:
    """Return the tokens in `folder`, after writing the batches of `tokenize()` if it is incomplete.

    Raises StorageError.
    """
    try:
        if not _is_complete(folder):
            _build(folder, tokenize)
        return _load(folder)
    except Exception as error:
        failure = _storage_failure(error)
        if failure is None:
            raise
        raise StorageError(f"data.cache_dir: {folder}: {failure.strerror or failure}") from error


def _storage_failure(error: BaseException | None) -> OSError | None:
    """Return the failed write behind an error; Arrow may raise a second error when it closes the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def responses(sides: Sequence[tuple[list[int], int]]) -> Responses:
    """Return (ids, start) of single responses as one record."""
    lengths = np.array([len(ids) for ids, _ in sides], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(ids for ids, _ in sides), dtype=np.int32, count=int(lengths.sum()))
    return Responses(flat, lengths, np.array([start for _, start in sides], dtype=np.int32))


def _is_complete(folder: Path) -> bool:
    """Return whether the cache folder exists and is complete."""
    try:
        size = json.loads((folder / SUMMARY_FILE).read_bytes())["bytes"]
        return bool((folder / TOKENS_FILE).stat().st_size == size)
    except (FileNotFoundError, ValueError, LookupError):
        return False


def _build(folder: Path, tokenize: Callable[[], Iterable[Fresh]]) -> None:
    """Write the folder atomically; if several processes do, the first to finish wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # mkdtemp makes a folder that only its owner can read, but others may share the cache. A folder
        # inside it gets the usual permissions.
        ready = work / "ready"
        ready.mkdir()
        _write(tokenize(), ready)
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            ready.rename(folder)
        except OSError:
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(parts: Iterable[Fresh], folder: Path) -> None:
    statuses: list[str] = []
    made: list[list[Responses]] = []
    for some, of_each in parts:
        statuses += some
        made.append(of_each)
    kept = np.array([status in (KEPT, TRUNCATED) for status in statuses], dtype=bool)
    columns: dict[str, Any] = {"row": _arrow(np.flatnonzero(kept))}
    for k, pieces in enumerate(zip(*made, strict=True)):
        columns[f"ids_{k}"] = _arrow_lists(pieces)
        columns[f"start_{k}"] = _arrow(np.concatenate([piece.start for piece in pieces]))
    _write_columns(columns, folder / TOKENS_FILE)
    summary = {
        "bytes": (folder / TOKENS_FILE).stat().st_size,
        "truncated": statuses.count(TRUNCATED),
        "left_out": [(i, status) for i, status in enumerate(statuses) if not kept[i]],
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _write_columns(columns: dict[str, Any], path: Path) -> None:
    import pyarrow as pa

    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    with path.open("wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _arrow_lists(pieces: Sequence[Responses]) -> Any:
    import pyarrow as pa

    lengths = np.concatenate([np.zeros(1, np.int64), *(piece.lengths for piece in pieces)])
    flat = np.concatenate([piece.ids for piece in pieces])
    return pa.LargeListArray.from_arrays(_arrow(np.cumsum(lengths)), _arrow(flat))


# Arrow's own conversions from and to numpy import pandas if it is installed: 0.25 s and 40 MiB per rank.
def _arrow(values: npt.NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _numpy(array: Any) -> npt.NDArray[Any]:
    """Return an Arrow array of numbers as numpy, without a copy."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _load(folder: Path) -> StoredTokens:
    import pyarrow as pa

    summary = json.loads((folder / SUMMARY_FILE).read_bytes())
    batch = pa.ipc.open_stream(pa.memory_map(str(folder / TOKENS_FILE))).read_next_batch()
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in batch.schema.names:
        array = batch.column(name)
        if name.startswith("ids_"):
            columns[name.replace("ids", "offsets")] = _numpy(array.offsets)
            array = array.values
        columns[name] = _numpy(array)
    rows = columns.pop("row").tolist()
    left_out = [(index, status) for index, status in summary["left_out"]]
    return StoredTokens(rows, columns, left_out, summary["truncated"])
