"""The store of token ids: a folder for each set of rows, written whole or not at all, read memory-mapped.

`tokens.arrow` is one Arrow record batch, so that every column is one flat array, and `summary.json` says
how long it is and what was left out. Several processes may ask for the same folder at once.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offline_align.errors import StorageError

KEPT, TRUNCATED, REFUSED = "kept", "truncated", "chat_template: "
"""Statuses of rows; after `REFUSED` stands the chat template's message. Others are reasons to leave out."""

TOKENS_FILE, SUMMARY_FILE = "tokens.arrow", "summary.json"


@dataclass(frozen=True)
class StoredTokens:
    """One folder of the store."""

    rows: list[int]
    """Index of each kept row among those asked for."""
    columns: dict[str, npt.NDArray[Any]]
    """`ids_k` [T], `offsets_k` [n + 1] and `start_k` [n] of the k-th response."""
    left_out: list[tuple[int, str]]
    """Index and status of each other row."""
    truncated: int
    """Rows whose prompt was cut."""

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return dict(Counter(status.partition(":")[0] for _, status in self.left_out))

    @property
    def refused(self) -> list[tuple[int, str]]:
        """Index and message of the rows that the chat template refuses."""
        return [(row, status.removeprefix(REFUSED)) for row, status in self.left_out if status.startswith(REFUSED)]


def stored(folder: Path, tokenize: Callable[[], Any]) -> StoredTokens:
    """Return what the folder holds; `tokenize()` makes it where it is not there in full length.

    `tokenize` returns an Arrow table with the columns `status`, `ids_k` and `start_k`, and a row for each
    row asked for. Raises StorageError.
    """
    try:
        if not _whole(folder):
            _build(folder, tokenize)
        return _load(folder)
    except Exception as error:
        failure = _storage_failure(error)
        if failure is None:
            raise
        raise StorageError(f"data.cache_dir: {folder}: {failure.strerror or failure}") from error


def _storage_failure(error: BaseException | None) -> OSError | None:
    """Return the failed write behind an error: closing its file, Arrow may fail once more in another way."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def id_lists(rows: Sequence[list[int]]) -> Any:
    """Return rows of ids as an Arrow array of lists."""
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=sum(map(len, rows)))
    return _lists(flat, [len(ids) for ids in rows])


def _lists(flat: npt.NDArray[np.int32], lengths: Sequence[int] | npt.NDArray[np.int64]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _whole(folder: Path) -> bool:
    """Return whether the cache folder is there in full length."""
    try:
        size = json.loads((folder / SUMMARY_FILE).read_bytes())["bytes"]
        return bool((folder / TOKENS_FILE).stat().st_size == size)
    except (FileNotFoundError, ValueError, LookupError):
        return False


def _build(folder: Path, tokenize: Callable[[], Any]) -> None:
    """Write the folder whole or not at all; of several processes the first to finish wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        ready = work / "ready"
        ready.mkdir()
        _write(tokenize(), ready)
        if folder.exists() and not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            ready.rename(folder)
        except OSError:
            if not _whole(folder):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(table: Any, folder: Path) -> None:
    statuses: list[str] = table["status"].to_pylist()
    batch = _kept_batch(table, np.array([status in (KEPT, TRUNCATED) for status in statuses], dtype=bool))
    _write_batch(batch, folder / TOKENS_FILE)
    summary = {
        "bytes": (folder / TOKENS_FILE).stat().st_size,
        "truncated": statuses.count(TRUNCATED),
        "left_out": [(i, status) for i, status in enumerate(statuses) if status not in (KEPT, TRUNCATED)],
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def _kept_batch(table: Any, kept: npt.NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {"row": pa.array(np.flatnonzero(kept), pa.int64())}
    for name in table.column_names[1:]:
        if name.startswith("ids_"):
            columns[name] = _joined(table[name])
        else:
            columns[name] = pa.array(table[name].to_numpy()[kept], pa.int32())
    return pa.record_batch(columns)


def _write_batch(batch: Any, path: Path) -> None:
    import pyarrow as pa

    with path.open("wb") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _joined(column: Any) -> Any:
    """Return a chunked list column as one list array, its empty lists (rows left out) removed."""
    chunks = [(chunk.offsets.to_numpy(), chunk.values) for chunk in column.chunks]
    lengths = np.concatenate([np.diff(offsets) for offsets, _ in chunks] or [np.zeros(0, np.int64)])
    pieces = [values.to_numpy()[offsets[0] : offsets[-1]] for offsets, values in chunks]
    flat = np.concatenate(pieces or [np.zeros(0, np.int32)])
    return _lists(flat, lengths[lengths > 0])


def _load(folder: Path) -> StoredTokens:
    import pyarrow as pa

    summary = json.loads((folder / SUMMARY_FILE).read_bytes())
    table = pa.ipc.open_stream(pa.memory_map(str(folder / TOKENS_FILE))).read_all()
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in table.column_names:
        array = table.column(name).chunk(0)
        if name.startswith("ids_"):
            columns[name.replace("ids", "offsets")] = array.offsets.to_numpy()
            array = array.values
        columns[name] = array.to_numpy(zero_copy_only=True)
    rows = columns.pop("row").tolist()
    left_out = [(index, status) for index, status in summary["left_out"]]
    return StoredTokens(rows, columns, left_out, summary["truncated"])
