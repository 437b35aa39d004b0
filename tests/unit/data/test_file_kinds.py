"""A file that cannot be read ends a command with one line: the file, its kind, and the fix."""

import bz2
import gzip
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows, input_paths, is_empty, read_objects
from offline_align.data.sources import input_sources, read_source
from offline_align.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [{"prompt": f"naïve {i}", "response": "b"} for i in range(3)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)


def arrow(stream: bool) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue().to_pybytes())


def packed(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def zstd() -> bytes:
    return packed(TEXT.encode())


def spreadsheet() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


# File name, content, and the start and end of the error message.
KINDS: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "zstd twice": ("a.jsonl.zst", lambda: packed(zstd()), "zstd: ", "unpack it once"),
    "zstd by name only": ("a.jsonl.zst", TEXT.encode, "zstd: ", "rename it"),
    "bzip2": ("a.jsonl.bz2", lambda: bz2.compress(TEXT.encode()), "bzip2: ", "bunzip2"),
    "xz": ("a.jsonl.xz", lambda: lzma.compress(TEXT.encode()), "xz: ", "unxz"),
    "gzip twice": ("a.jsonl.gz", lambda: gzip.compress(gzip.compress(TEXT.encode())), "gzip: ", "unpack it once"),
    "gzip by name only": ("a.jsonl.gz", TEXT.encode, "gzip: ", "rename it"),
    "packed arrow": ("a.arrow.gz", lambda: gzip.compress(arrow(stream=False)), "arrow: ", "`prepare` reads"),
    "packed parquet": ("a.parquet.gz", lambda: gzip.compress(parquet()), "parquet: ", "`prepare` reads"),
    "spreadsheet": ("a.xlsx", spreadsheet, "zip: ", "export its rows"),
    "UTF-16": ("a.jsonl", lambda: TEXT.encode("utf-16"), "encoding: not UTF-8 but UTF-16", "iconv -f UTF-16 "),
    "UTF-16 LE": ("a.jsonl", lambda: TEXT.encode("utf-16-le"), "encoding: not UTF-8 but UTF-16", "-f UTF-16LE "),
    "UTF-16 BE": ("a.jsonl", lambda: TEXT.encode("utf-16-be"), "encoding: not UTF-8 but UTF-16", "-f UTF-16BE "),
    "UTF-16 array": ("a.json", lambda: json.dumps(ROWS).encode("utf-16"), "encoding: not UTF-8 but UTF-16", "iconv"),
    "UTF-32": ("a.jsonl", lambda: TEXT.encode("utf-32"), "encoding: not UTF-8 but UTF-32", "iconv -f UTF-32 "),
    "pickle": ("a.pkl", lambda: pickle.dumps(ROWS, protocol=4), "binary: ", "as JSONL"),
    "web page": ("a.jsonl", lambda: b"<!DOCTYPE html>\n<html></html>\n", "html: ", "fetch the file itself"),
    "git lfs": ("a.jsonl", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs: ", "pull"),
}
# Files that only `prepare` reads: other stages refuse them as above.
FOR_PREPARE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "arrow file": ("a.arrow", lambda: arrow(stream=False), "arrow: "),
    "arrow of datasets": ("data-00000-of-00001.arrow", lambda: arrow(stream=True), "arrow: "),
    "parquet by another name": ("rows.pq", lambda: parquet(), "parquet: "),
    "CSV": ("a.csv", lambda: TABLE.encode(), "csv: "),
    "CSV of a spreadsheet": ("a.csv", lambda: b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(), "csv: "),
    "CSV with semicolons": ("a.csv", lambda: TABLE.replace(",", ";").encode(), "csv: "),
    "packed TSV": ("a.tsv.gz", lambda: gzip.compress(TABLE.replace(",", "\t").encode()), "tsv: "),
    "an object over lines": ("a.json", lambda: "\n".join(json.dumps(r, indent=1) for r in ROWS).encode(), "json: one"),
    "an array over lines": ("a.jsonl", lambda: json.dumps(ROWS, indent=1).encode(), "json: one value"),
    "an item a line": (
        "a.jsonl",
        lambda: f"[\n{TEXT.strip().replace(chr(10), ',' + chr(10))}\n]\n".encode(),
        "json: one",
    ),
    "packed array": ("a.json.gz", lambda: gzip.compress(json.dumps(ROWS, indent=1).encode()), "json: one"),
    "zstd array": ("a.json.zst", lambda: packed(json.dumps(ROWS, indent=1).encode()), "json: one"),
    "an array in an object": ("a.json", lambda: json.dumps({"v": 1, "data": ROWS}, indent=1).encode(), "json: one"),
}


@pytest.mark.parametrize("on_bad_row", OnBadRow)
@pytest.mark.parametrize(("name", "content", "problem", "fix"), KINDS.values(), ids=KINDS)
def test_other_kinds_are_refused_as_a_whole(
    tmp_path: Path, name: str, content: Callable[[], bytes], problem: str, fix: str, on_bad_row: OnBadRow
) -> None:
    path, bad_rows = tmp_path / name, BadRows(on_bad_row, None)
    path.write_bytes(content())
    [source] = input_sources(str(path), "data.input")
    for read in (
        lambda: list(read_objects([path], bad_rows)),
        lambda: list(read_source(source, bad_rows, None)),
        lambda: is_empty([path]),
    ):
        with pytest.raises(DataError) as error:
            read()
        message = str(error.value)
        assert message.startswith(f"{path}:1: {problem}") and fix in message and "\n" not in message
        assert "on_bad_row" not in message
        assert error.value.exit_code == 65


@pytest.mark.parametrize(("name", "content", "problem"), FOR_PREPARE.values(), ids=FOR_PREPARE)
def test_some_kinds_are_for_prepare_alone(
    tmp_path: Path, name: str, content: Callable[[], bytes], problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    [source] = input_sources(str(path), "data.input")
    assert [line.value for line in read_source(source, BadRows(OnBadRow.fail, None), None)] == ROWS
    with pytest.raises(DataError, match=rf"{name}:1: {problem}.*`prepare` reads"):
        list(read_objects([path], BadRows(OnBadRow.fail, None)))


@pytest.mark.parametrize("pack", [gzip.compress, packed])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_gzip_and_zstd_are_read_whatever_their_name(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pack(TEXT.encode()))
    assert [line.value for line in read_objects([path], BadRows(OnBadRow.fail, None))] == ROWS
    path.write_bytes(pack(TEXT.encode() * 2) + pack(TEXT.encode()))
    assert [line.value for line in read_objects([path], BadRows(OnBadRow.fail, None))] == ROWS * 3


@pytest.mark.parametrize("pack", [gzip.compress, packed])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_truncated_file_is_bad_data(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    text = {"a.jsonl": TEXT, "a.json": json.dumps(ROWS, indent=1), "a.csv": TABLE}[name]
    path = tmp_path / name
    path.write_bytes(pack(text.encode())[:-3])
    [source] = input_sources(str(path), "data.input")
    with pytest.raises(DataError, match=r":\d+: (gzip|zstd): damaged or truncated.*fetch the file again"):
        list(read_source(source, BadRows(OnBadRow.fail, None), None))


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a", "a.csv.jsonl"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_jsonl_is_read_whatever_its_name(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(start + TEXT.encode())
    assert [line.value for line in read_objects([path], BadRows(OnBadRow.fail, None))] == ROWS


@pytest.mark.parametrize("line", [b"{", b"[", b"\0", b"prompt,response", '{"a": 1}'.encode("utf-16-le")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_one_damaged_line_at_the_start_is_a_bad_row(tmp_path: Path, name: str, line: bytes) -> None:
    path, bad_rows = tmp_path / name, BadRows(OnBadRow.skip, None)
    path.write_bytes(line + b"\n" + TEXT.encode())
    assert [line.value for line in read_objects([path], bad_rows)] == ROWS
    assert bad_rows.counts.total() == 1


def test_latin_1_is_named_with_its_line_and_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "plain", "response": "b"}\n' + TEXT.encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: encoding: not UTF-8; save the file as UTF-8 .*LATIN1"):
        list(read_objects([path], BadRows(OnBadRow.fail, None)))
    array = tmp_path / "rows.json"
    array.write_bytes(json.dumps([{"a": 1}, *ROWS], indent=1, ensure_ascii=False).encode("latin-1"))
    [source] = input_sources(str(array), "data.input")
    with pytest.raises(DataError, match=r"rows\.json:6: encoding: not UTF-8; save the file as UTF-8 .*LATIN1"):
        list(read_source(source, BadRows(OnBadRow.fail, None), None))


def test_folders_and_pipes_are_configuration_errors(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name, problem in ((".", "is a folder; name the files in it"), ("pipe", "is not a regular file")):
        with pytest.raises(ConfigError, match=problem) as error:
            input_paths(str(tmp_path / name), "data.input")
        assert error.value.exit_code == 78
    with pytest.raises(ConfigError, match="is not a regular file"):
        input_sources(str(tmp_path / "pipe"), "data.input")
