"""Recognise files that are not JSONL at all by their first bytes, and refuse them with a fix."""

import re
from pathlib import Path

from offline_align.errors import DataError

HEAD_BYTES = 4096
UTF8_BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
_ARROW = "arrow: not JSONL; save the data set with `to_json` or `to_parquet`"
_FETCH = "not the data; fetch the file itself"

# First bytes; kind, problem and fix. UTF-32 starts with the bytes of UTF-16, so it comes first.
_SIGNATURES = (
    (GZIP, "gzip: compressed twice; unpack it once"),
    (b"\x28\xb5\x2f\xfd", "zstd: this compression is not supported; unpack the file with `zstd -d`"),
    (b"BZh", "bzip2: this compression is not supported; unpack the file with `bunzip2`"),
    (b"\xfd7zXZ", "xz: this compression is not supported; unpack the file with `unxz`"),
    (b"PK\x03\x04", "zip: an archive or a spreadsheet, not JSONL; unpack it, or export its rows as JSONL"),
    (PARQUET, "parquet: not JSONL; `prepare` reads Parquet that is not gzipped, and writes JSONL"),
    (b"ARROW1", _ARROW),
    (b"\xff\xff\xff\xff", _ARROW),
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
    first, second = (*head.removeprefix(UTF8_BOM).lstrip().split(b"\n", 2), b"")[:2]
    if first.startswith(b'{"') or _is_row(second):
        return None  # errors in single lines are reported line by line
    if b"\0" in first[:16]:
        return "binary: not a text file; give rows as JSONL"
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix in _TABLES:
        return f"{suffix[1:]}: values between {_TABLES[suffix]}, not JSONL; export the rows as JSONL"
    if first.strip() in (b"[", b"{"):
        return "json: one value over several lines; write one object a line, as `jq -c '.[]'` does for an array"
    return None


def _is_row(line: bytes) -> bool:
    """Return whether a line may be a whole object rather than an item of an array."""
    return line.startswith(b"{") and not line.rstrip().endswith((b"{", b","))
