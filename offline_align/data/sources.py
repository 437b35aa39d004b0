"""Inputs of `prepare`: JSONL, JSON, Parquet, data sets from the Hugging Face Hub, and the demo corpus.

Rows of every format pass the same strict checks as a JSONL line.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from offline_align.data.file_kinds import HEAD_BYTES, PARQUET, UTF8_BOM
from offline_align.data.hub import require_hub
from offline_align.data.jsonl import (
    FIXES,
    HUB_PREFIX,
    NOT_UTF8,
    BadRows,
    Line,
    RowError,
    input_paths,
    parse_object,
    read_objects,
    readable,
)
from offline_align.errors import AlignError, ConfigError, DataError, StorageError

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Source:
    """One input: a file, `hf:<name>[/<folder>][#<split>]`, or `demo`; `name` appears in ids and reports."""

    name: str
    path: Path | None

    @property
    def is_demo(self) -> bool:
        """Return whether this is the demo corpus, which is generated instead of read."""
        return self.path is None and self.name == DEMO


def input_sources(value: Any, key: str) -> list[Source]:
    """Return the inputs that a setting names; raises ConfigError, naming `key`, for unusable files."""
    names = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise ConfigError(f"{key}={value!r}: needs a path, `hf:<name>`, `demo`, or a list of them")
    files = [name for name in names if not _is_special(name)]
    paths = iter(input_paths(files, key) if files else [])
    unique = Counter(Path(str(name)).name for name in files)
    sources = [Source(str(name), None if _is_special(name) else next(paths)) for name in names]
    return [Source(s.path.name, s.path) if s.path and unique[s.path.name] == 1 else s for s in sources]


def _is_special(name: Any) -> bool:
    return isinstance(name, str) and (name == DEMO or name.startswith(HUB_PREFIX))


def read_source(source: Source, bad_rows: BadRows, max_rows: int | None) -> Iterator[Line]:
    """Yield the objects of one input, at most `max_rows`; lines that are not objects go to `bad_rows`.

    Raises DataError for a file that cannot be read as a whole, and ConfigError for a data set that
    cannot be loaded.
    """
    return islice(_objects(source, bad_rows), max_rows)


def _objects(source: Source, bad_rows: BadRows) -> Iterator[Line]:
    if source.path is None:
        return _checked(Path(source.name), _hub_rows(source.name), bad_rows)
    head = _head(source.path)
    if head.startswith(PARQUET) or source.path.suffix == ".parquet":
        return _checked(source.path, _parquet_rows(source.path), bad_rows)
    if source.path.suffix == ".json" and head.lstrip(UTF8_BOM + b" \t\r\n").startswith(b"["):
        return _checked(source.path, _array_items(source.path), bad_rows)
    return read_objects([source.path], bad_rows)


def _checked(path: Path, rows: Iterable[Any], bad_rows: BadRows) -> Iterator[Line]:
    for number, row in enumerate(rows, start=1):
        raw = json.dumps(row, default=str).encode()
        try:
            yield Line(path, number, raw, parse_object(raw))
        except RowError as error:
            bad_rows.reject(path, number, str(error), readable(raw))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror}") from error


def _array_items(path: Path) -> list[Any]:
    try:
        items: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {NOT_UTF8}; {FIXES[NOT_UTF8]}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: json: not valid JSON; fix the file") from error
    except RecursionError as error:
        raise DataError(f"{path}:1: json: nested too deeply") from error
    return items


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:1: parquet: cannot be read; fetch the file again") from error


def _hub_rows(name: str) -> Iterator[Any]:
    """Stream the rows of a data set, so that nothing is written outside the run folder."""
    import datasets

    full, _, split = name.removeprefix(HUB_PREFIX).partition("#")
    repository, folder = _repository(full)
    if not Path(repository).exists():
        require_hub(name)
    try:
        yield from datasets.load_dataset(repository, data_dir=folder, split=split or "train", streaming=True)
    except Exception as error:  # third-party files can fail in any way; scripts of a data set are never run
        if isinstance(error, AlignError):
            raise
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data.input={name}: cannot be loaded: {problem}") from error


def _repository(name: str) -> tuple[str, str | None]:
    """Split `owner/set/folder` into the data set and a folder in it; a local path is not split."""
    if Path(name).exists():
        return name, None
    owner, _, rest = name.partition("/")
    title, _, folder = rest.partition("/")
    return (f"{owner}/{title}", folder or None) if title else (name, None)
