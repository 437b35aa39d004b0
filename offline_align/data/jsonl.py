"""Strict reading and atomic writing of JSONL: one object per line, UTF-8, optionally compressed.

Nothing is guessed and nothing is dropped silently. A line that is not one plain JSON object is
rejected with file, line and reason; this ends the run or goes into a quarantine file.
"""

import contextlib
import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from offline_align.config.sections import OnBadRow
from offline_align.data.file_kinds import GZIP, HEAD_BYTES, UTF8_BOM, ZSTD, refuse_other_kinds
from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.lineage.files import fsync_path
from offline_align.wording import counted

HUB_PREFIX = "hf:"
NOT_UTF8 = "encoding: not UTF-8"
DAMAGED = "gzip: damaged or truncated, the rest of the file is lost"
DAMAGED_ZSTD = "zstd: damaged or truncated, the rest of the file is lost"
FIXES = {
    NOT_UTF8: "save the file as UTF-8 (from Latin-1: `iconv -f LATIN1 -t UTF-8`)",
    DAMAGED: "fetch the file again",
    DAMAGED_ZSTD: "fetch the file again",
    **dict.fromkeys(
        ("reward: missing", "reward_raw: missing"),
        "the rows have no rewards: give the labelled.jsonl that `label` writes, or `prepare` with prepare.score_column",
    ),
}
WITHOUT_SKIPPING = frozenset({"reward: missing", "reward_raw: missing"})
"""Faults that all rows of a file share, so that skipping them would leave nothing."""
BRACKETS_TO_CHECK = 500  # a line with fewer brackets is never nested too deeply to be serialised again


class RowError(ValueError):
    """A row cannot be used. The message is `field: reason`, the same for all rows with this fault."""


class BadRows:
    """Handles unusable rows: `fail` raises, `skip` counts them and writes them to `quarantine`.

    If `quarantine` is None, rows are only counted. The first bad row overwrites an existing file.
    """

    def __init__(self, on_bad_row: OnBadRow, quarantine: Path | None) -> None:
        self.on_bad_row = on_bad_row
        self.quarantine = quarantine
        self.counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()

    def reject(self, path: Path, line_no: int, reason: str, raw: str) -> None:
        """Count and quarantine one row, or raise DataError `file:line: field: reason; fix`."""
        if self.on_bad_row is OnBadRow.fail:
            fix = FIXES.get(reason, "fix the row")
            skipping = "" if reason in WITHOUT_SKIPPING else ", or set data.on_bad_row=skip"
            raise DataError(f"{path}:{line_no}: {reason}; {fix}{skipping}")
        if self.quarantine is not None:
            self._write(self.quarantine, {"file": str(path), "line": line_no, "reason": reason, "raw": raw})
        self.counts[reason] += 1

    def report(self, log: logging.Logger) -> None:
        """Log how many rows were left out since the last report, and why."""
        new = self.counts - self._reported
        if new:
            where = f", see {self.quarantine}" if self.quarantine else ""
            rows = counted(new.total(), "bad row is", "bad rows are")
            log.warning("%s left out%s: %s", rows, where, dict(new))
        self._reported = Counter(self.counts)

    def _write(self, quarantine: Path, row: dict[str, Any]) -> None:
        mode = "a" if self.counts else "w"
        try:
            quarantine.parent.mkdir(parents=True, exist_ok=True)
            with quarantine.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"{quarantine}: cannot write: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Line:
    """One JSON object with its file and line number."""

    path: Path
    number: int
    raw: bytes
    value: dict[str, Any]

    def reject(self, bad_rows: BadRows, reason: str) -> None:
        """Reject this line, see `BadRows.reject`."""
        bad_rows.reject(self.path, self.number, reason, readable(self.raw))


def readable(raw: bytes) -> str:
    """Return a line as text, with bytes that are not UTF-8 written as `\\xNN`."""
    return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def read_objects(paths: Sequence[Path], bad_rows: BadRows, every: int = 1) -> Iterator[Line]:
    """Yield every JSON object of the files in order; other lines go to `bad_rows`.

    With `every`, only the first of so many lines is read, then the first of the next ones. Blank
    lines are ignored but counted in line numbers. A byte order mark at the start of a file is
    allowed. Raises DataError for a file that is not JSONL at all, even if bad rows are skipped.
    """
    for path in paths:
        for number, raw in numbered_lines(path, bad_rows):
            if (number - 1) % every or not raw.strip():
                continue
            try:
                yield Line(path, number, raw, parse_object(raw))
            except RowError as error:
                bad_rows.reject(path, number, str(error), readable(raw))


def count_lines(paths: Sequence[Path], every: int = 1) -> int:
    """Return how many lines `read_objects` reads; raises DataError (not JSONL), StorageError."""
    found = BadRows(OnBadRow.skip, None)
    lines = (line for path in paths for line in numbered_lines(path, found))
    return sum(1 for number, raw in lines if not (number - 1) % every and raw.strip())


def is_empty(paths: Sequence[Path]) -> bool:
    """Return whether the files have only blank lines; raises DataError (not JSONL), StorageError."""
    found = BadRows(OnBadRow.skip, None)
    return not any(raw.strip() for path in paths for _, raw in numbered_lines(path, found)) and not found.counts


def numbered_lines(path: Path, bad_rows: BadRows, jsonl_only: bool = True) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, unpacked, with their numbers from 1 and without a byte order mark.

    Raises DataError for a file that is not JSONL if `jsonl_only`, and StorageError. A damaged
    compression goes to `bad_rows`.
    """
    number = 0
    try:
        with unpacked(path) as file:
            if jsonl_only:
                refuse_other_kinds(path, file.peek(HEAD_BYTES))
            for number, raw in enumerate(file, start=1):
                yield number, raw.removeprefix(UTF8_BOM) if number == 1 else raw
    except (EOFError, OSError, zlib.error) as error:
        bad_rows.reject(path, number + 1, damage(path, error), "")


def damage(path: Path, error: Exception) -> str:
    """Return what is wrong with the compression of a file; raises StorageError if it cannot be read."""
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return DAMAGED
    assert isinstance(error, OSError)
    if error.errno is None:  # from the decompressor, not from the operating system
        return DAMAGED_ZSTD
    raise StorageError(f"{path}: cannot read: {error.strerror}") from error


def is_packed(path: Path) -> bool:
    """Return whether the content of a file is gzip or zstd, whatever its name; raises OSError."""
    with path.open("rb") as stored:
        return stored.peek(len(ZSTD)).startswith((GZIP, ZSTD))


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open a file, decompressed if its content is gzip or zstd, whatever its name.

    Raises DataError for a file whose name promises another compression, and OSError.
    """
    with path.open("rb") as stored:
        head = stored.peek(len(ZSTD))
        if head.startswith(GZIP):
            yield gzip.GzipFile(fileobj=stored)
        elif head.startswith(ZSTD):
            import pyarrow

            yield BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"))
        elif head and path.suffix in (".gz", ".zst"):
            kind = "gzip" if path.suffix == ".gz" else "zstd"
            raise DataError(f"{path}:1: {kind}: not a {kind} file, despite its name; rename it, or fetch it again")
        else:
            yield stored


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of one line; raises RowError if it is anything else or ambiguous."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(NOT_UTF8) from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RowError:
        raise
    except RecursionError as error:
        raise RowError("json: nested too deeply") from error
    except ValueError as error:
        raise RowError(f"json: {_fault(error)}") from error
    if not isinstance(value, dict):
        raise RowError("json: not an object")
    _check_writable(text, value)
    return value


def _fault(error: ValueError) -> str:
    extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
    return "more than one value on the line" if extra else "not valid JSON"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise RowError("json: a key occurs twice in an object")
    return value


def _refuse(_: str) -> None:
    raise RowError("json: NaN and Infinity are not numbers of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise RowError("json: number out of range")
    return value


def _check_writable(text: str, value: dict[str, Any]) -> None:
    suspicious = "\\ud" in text.lower() or text.count("[") + text.count("{") > BRACKETS_TO_CHECK
    if not suspicious:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("encoding: lone surrogate") from error
    except RecursionError as error:
        raise RowError("json: nested too deeply") from error


def input_paths(value: Any, key: str) -> list[Path]:
    """Return the files that a setting names; raises ConfigError, naming `key`, with all its problems."""
    names = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, (str, Path)) for n in names):
        raise ConfigError(f"{key}={value!r}: needs a path or a list of paths")
    paths = [Path(name) for name in names]
    problems = [f"{key}={path}: {problem}" for path in paths if (problem := _path_problem(path))]
    problems += [f"{key}={path}: given twice" for path, count in Counter(paths).items() if count > 1]
    if problems:
        raise ConfigError(problems)
    return paths


def _path_problem(path: Path) -> str | None:
    if path.is_dir():
        return "is a folder; name the files in it"
    if not path.exists():
        # Data sets of the Hub are read later, once all settings are validated.
        return None if str(path).startswith(HUB_PREFIX) else "no such file"
    if not path.is_file():
        return "is not a regular file, but is read more than once; write its rows to a regular file"
    return None if os.access(path, os.R_OK) else "cannot be read; check its permissions"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to `path` atomically and return their number; raises StorageError if the write fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count
