"""Recognise the kind of a file by its first bytes; refuse those that cannot be read, with a fix."""

import re
from enum import Enum
from pathlib import Path

from offline_align.errors import DataError

HEAD_BYTES = 4096
UTF8_BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
ZSTD = b"\x28\xb5\x2f\xfd"
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"
PACKED_SUFFIXES = (".gz", ".zst")
_ARROW = "arrow: not JSONL; `prepare` reads Arrow files that are not compressed, and writes JSONL"
_FETCH = "not the data; fetch the file itself"

# First bytes; kind, problem and fix. UTF-32 starts with the bytes of UTF-16, so it comes first.
_SIGNATURES = (
    (GZIP, "gzip: compressed twice; unpack it once"),
    (ZSTD, "zstd: compressed twice; unpack it once"),
    (b"BZh", "bzip2: this compression is not supported; unpack the file with `bunzip2`"),
    (b"\xfd7zXZ", "xz: this compression is not supported; unpack the file with `unxz`"),
    (b"PK\x03\x04", "zip: an archive or a spreadsheet, not JSONL; unpack it, or export its rows as JSONL"),
    (PARQUET, "parquet: not JSONL; `prepare` reads Parquet that is not compressed, and writes JSONL"),
    (ARROW_FILE, _ARROW),
    (ARROW_STREAM, _ARROW),
    (b"\xff\xfe\0\0", "encoding: not UTF-8 but UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`"),
    (b"\0\0\xfe\xff", "encoding: not UTF-8 but UTF-32; convert it with `iconv -f UTF-32 -t UTF-8`"),
    (b"\xff\xfe", "encoding: not UTF-8 but UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "encoding: not UTF-8 but UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"version https://git-lfs", f"git-lfs: a pointer to the file, {_FETCH}, with `git lfs pull`"),
    (b"<!doctype html", f"html: a web page, {_FETCH}"),
    (b"<html", f"html: a web page, {_FETCH}"),
)
# UTF-16 without a byte order mark: a bracket, and a zero byte at every line end. A UTF-8 file with one
# damaged line does not match.
_UTF16_LE = re.compile(rb"[{\[]\0(?:[^\n]|\n\0)*\Z", re.DOTALL)
_UTF16_BE = re.compile(rb"\0[{\[](?:[^\n]|(?<=\0)\n)*\Z", re.DOTALL)
_TABLES = {".csv": "commas", ".tsv": "tabs"}


class Kind(Enum):
    """How the rows of a file are stored."""

    jsonl = "one JSON object a line"
    json = "JSON values over several lines, or an array"
    table = "CSV or TSV"
    parquet = "Parquet"
    arrow = "Arrow IPC, as a file or as a stream"


def kind_of(path: Path, head: bytes, packed: bool) -> Kind:
    """Return the kind of a file whose unpacked content starts with `head`.

    `packed` says if the file is compressed. Raises DataError `file:1: kind: problem; fix` for a file
    that cannot be read.
    """
    if not packed and (head.startswith(PARQUET) or path.suffix == ".parquet"):
        return Kind.parquet
    if not packed and head.startswith((ARROW_FILE, ARROW_STREAM)):
        return Kind.arrow
    text = head.removeprefix(UTF8_BOM).lstrip()
    problem = _problem(path, head[:HEAD_BYTES])
    if problem is None:
        is_array = text.startswith(b"[") and (inner_suffix(path) == ".json" or text[1:].lstrip().startswith(b"{"))
        first, second = _two_lines(head)
        return Kind.json if is_array and not (first.strip() == b"[" and _is_row(second)) else Kind.jsonl
    kind = problem.partition(":")[0]
    if kind == "json":
        return Kind.json
    if f".{kind}" in _TABLES:
        return Kind.table
    raise DataError(f"{path}:1: {problem}")


def inner_suffix(path: Path) -> str:
    """Return the suffix of a file name in lower case, without that of a compression."""
    return (path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path).suffix.lower()


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise DataError `file:1: kind: problem; fix` if `head`, a file's start, is not JSONL."""
    problem = _problem(path, head[:HEAD_BYTES])
    if problem is not None:
        raise DataError(f"{path}:1: {problem}")


def _problem(path: Path, head: bytes) -> str | None:
    for start, problem in _SIGNATURES:
        if head[: len(start)].lower() == start.lower():
            return problem
    if _UTF16_LE.match(head) or _UTF16_BE.match(head):
        little = "LE" if head[1:2] == b"\0" else "BE"
        return f"encoding: not UTF-8 but UTF-16; convert it with `iconv -f UTF-16{little} -t UTF-8`"
    first, second = _two_lines(head)
    if first.startswith(b'{"') or _is_row(second):
        return None  # errors in single lines are reported line by line
    if b"\0" in first[:16]:
        return "binary: not a text file; give rows as JSONL"
    suffix = inner_suffix(path)
    if suffix in _TABLES:
        return f"{suffix[1:]}: values between {_TABLES[suffix]}, not JSONL; `prepare` reads it, and writes JSONL"
    if first.strip() in (b"[", b"{"):
        return "json: one value over several lines; `prepare` reads it, and so does `jq -c`; give one object a line"
    return None


def _two_lines(head: bytes) -> tuple[bytes, bytes]:
    first, second = (*head.removeprefix(UTF8_BOM).lstrip().split(b"\n", 2), b"")[:2]
    return first, second


def _is_row(line: bytes) -> bool:
    """Return whether a line may be a whole object rather than an item of an array."""
    return line.startswith(b"{") and not line.rstrip().endswith((b"{", b","))
