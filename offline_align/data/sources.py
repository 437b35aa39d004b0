"""Inputs of `prepare`: files of every kind, folders, data sets from the Hugging Face Hub, and the demo corpus.

Rows of every kind pass the same strict checks as a JSONL line.
"""

import glob
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from offline_align.data.file_kinds import HEAD_BYTES, Kind, inner_suffix, kind_of
from offline_align.data.hub import require_hub
from offline_align.data.jsonl import (
    FIXES,
    HUB_PREFIX,
    NOT_UTF8,
    BadRows,
    Line,
    RowError,
    damage,
    input_paths,
    is_packed,
    parse_object,
    read_objects,
    readable,
    unpacked,
)
from offline_align.data.tables import Numbered, arrow_rows, parquet_rows, text_table
from offline_align.errors import AlignError, ConfigError, DataError

DEMO = "demo"
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather")
"""Suffixes of the files that are read from a folder, also followed by `.gz` or `.zst`."""
_COMPANIONS = re.compile(
    r"dataset_(info|infos|dict)\.json|(state|config|manifest|report|reward_stats)\.json|quarantine\.jsonl|cache-.*"
)
"""Files that lie beside rows and have none."""
_LISTS = ("data", "rows", "train", "examples", "records", "samples")
"""Names under which a JSON file may hold its rows."""
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|eval|dev)([^a-z]|$)", re.IGNORECASE)


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
    names = [file for name in names for file in _files(name, key)]
    files = [name for name in names if not _is_special(name)]
    paths = iter(input_paths(files, key) if files else [])
    unique = Counter(Path(str(name)).name for name in files)
    sources = [Source(str(name), None if _is_special(name) else next(paths)) for name in names]
    return [Source(s.path.name, s.path) if s.path and unique[s.path.name] == 1 else s for s in sources]


def _files(name: Any, key: str) -> list[Any]:
    """Return the files that a folder or a pattern stands for; any other name stands for itself."""
    if not isinstance(name, (str, Path)) or _is_special(name):
        return [name]
    path = Path(name)
    if path.is_dir():
        found = _data_files(path)
        problem = f"the folder has no data file ({', '.join(DATA_SUFFIXES)}); name its files"
    elif glob.has_magic(str(name)) and not path.exists():
        # `Path.glob` takes no absolute pattern.
        matches = glob.glob(str(name), recursive=True)  # noqa: PTH207
        found = [file for file in map(Path, sorted(matches)) if file.is_file()]
        problem = "no file matches"
    else:
        return [name]
    if not found:
        raise ConfigError(f"{key}={name}: {problem}")
    return [str(file) for file in found]


def _data_files(folder: Path) -> list[Path]:
    """Return the data files in a folder and in those below it, without those of runs in it."""
    runs = {file.parent for file in folder.rglob("config.yaml")} - {folder}
    return [file for file in sorted(folder.rglob("*")) if _is_data(file, folder) and not runs & {*file.parents}]


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    known = inner_suffix(file) in DATA_SUFFIXES
    return known and not hidden and not _COMPANIONS.fullmatch(file.name) and file.is_file()


def held_out_files(value: Any, sources: Sequence[Source]) -> list[str]:
    """Return the test and validation files among those that a folder or a pattern in `value` stands for."""
    names = {str(name) for name in ([value] if isinstance(value, (str, Path)) else value)}
    found = [source.path for source in sources if source.path and str(source.path) not in names]
    held_out = [str(path) for path in found if _HELD_OUT.search(path.stem)]
    return held_out if len(held_out) < len(found) else []


def _is_special(name: Any) -> bool:
    return isinstance(name, str) and (name == DEMO or name.startswith(HUB_PREFIX))


def read_source(source: Source, bad_rows: BadRows, max_rows: int | None) -> Iterator[Line]:
    """Yield the objects of one input, at most `max_rows`; lines that are not objects go to `bad_rows`.

    Raises DataError for a file that cannot be read as a whole, and ConfigError for a data set that
    cannot be loaded.
    """
    return islice(_objects(source, bad_rows), max_rows)


def _objects(source: Source, bad_rows: BadRows) -> Iterator[Line]:
    path = source.path
    if path is None:
        return _checked(Path(source.name), enumerate(_hub_rows(source.name), start=1), bad_rows)
    kind = _kind(path)
    if kind is Kind.parquet:
        return _checked(path, parquet_rows(path), bad_rows)
    if kind is Kind.arrow:
        return _checked(path, arrow_rows(path), bad_rows)
    if kind is Kind.table:
        return _checked(path, text_table(path, bad_rows), bad_rows)
    if kind is Kind.json:
        return _checked(path, enumerate(_values(path), start=1), bad_rows)
    return read_objects([path], bad_rows)


def _kind(path: Path) -> Kind:
    try:
        with unpacked(path) as file:
            return kind_of(path, file.peek(HEAD_BYTES)[:HEAD_BYTES], packed=is_packed(path))
    except (EOFError, OSError, zlib.error) as error:
        reason = damage(path, error)
        raise DataError(f"{path}:1: {reason}; {FIXES[reason]}") from error


def _checked(path: Path, rows: Numbered, bad_rows: BadRows) -> Iterator[Line]:
    for number, row in rows:
        if isinstance(row, RowError):
            bad_rows.reject(path, number, str(row), "")
            continue
        raw = json.dumps(row, default=str).encode()
        try:
            yield Line(path, number, raw, parse_object(raw))
        except RowError as error:
            bad_rows.reject(path, number, str(error), readable(raw))


def _values(path: Path) -> Iterator[Any]:
    """Yield the rows of a JSON file: the items of an array, or objects over several lines.

    An object with a list of objects under a name such as `data` stands for that list.
    """
    text = _text(path)
    decoder, place = json.JSONDecoder(), 0
    while (place := _skip_space(text, place)) < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise DataError(f"{path}:{getattr(error, 'lineno', 1)}: json: not valid JSON; fix the file") from error
        except RecursionError as error:
            raise DataError(f"{path}:1: json: nested too deeply") from error
        yield from value if isinstance(value, list) else _listed(value)


def _skip_space(text: str, place: int) -> int:
    found = re.compile(r"\s*").match(text, place)
    assert found is not None
    return found.end()


def _listed(value: Any) -> list[Any]:
    lists = [rows for name, rows in value.items() if name in _LISTS] if isinstance(value, dict) else []
    wraps = len(lists) == 1 and isinstance(lists[0], list) and all(isinstance(row, dict) for row in lists[0])
    return lists[0] if wraps else [value]


def _text(path: Path) -> str:
    try:
        with unpacked(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {NOT_UTF8}; {FIXES[NOT_UTF8]}") from error
    except (EOFError, OSError, zlib.error) as error:
        reason = damage(path, error)
        raise DataError(f"{path}:1: {reason}; {FIXES[reason]}") from error


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
