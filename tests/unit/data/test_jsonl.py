"""Every kind of malformed line is reported with file and line; files are written atomically."""

import gzip
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows, input_paths, is_empty, read_objects, write_jsonl
from offline_align.errors import ConfigError, DataError, StorageError

GOOD = b'{"a": 1}'

BAD_LINES = {
    "invalid UTF-8": (b'{"a": "\xff"}', "encoding: not UTF-8"),
    "NUL byte": (b'{"a": "\x00"}', "json: not valid JSON"),
    "torn": (b'{"a": "x', "json: not valid JSON"),
    "two objects": (b'{"a": 1} {"a": 2}', "json: more than one value on the line"),
    "array": (b"[1]", "json: not an object"),
    "string": (b'"x"', "json: not an object"),
    "number": (b"3", "json: not an object"),
    "null": (b"null", "json: not an object"),
    "duplicate key": (b'{"a": 1, "a": 2}', "json: a key occurs twice in an object"),
    "duplicate inner key": (b'{"a": {"b": 1, "b": 1}}', "json: a key occurs twice in an object"),
    "lone surrogate": (b'{"a": "\\uD800"}', "encoding: lone surrogate"),
    "NaN": (b'{"a": NaN}', "json: NaN and Infinity are not numbers of JSON"),
    "Infinity": (b'{"a": -Infinity}', "json: NaN and Infinity are not numbers of JSON"),
    "1e400": (b'{"a": 1e400}', "json: number out of range"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "json: not valid JSON"),
    "deep arrays": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json: nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "json: nested too deeply"),
}


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> Path:
    content = end.join(lines) + end
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, bad_rows: BadRows) -> list[dict[str, Any]]:
    return [line.value for line in read_objects([path], bad_rows)]


def skipping(tmp_path: Path) -> BadRows:
    return BadRows(OnBadRow.skip, tmp_path / "run" / "quarantine.jsonl")


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_or_quarantined(tmp_path: Path, line: bytes, reason: str, name: str, position: int) -> None:
    lines = [GOOD, GOOD]
    lines.insert(position, line)
    path = write(tmp_path / name, *lines)
    with pytest.raises(DataError) as error:
        read(path, BadRows(OnBadRow.fail, None))
    assert str(error.value).startswith(f"{path}:{position + 1}: {reason};")
    assert "\n" not in str(error.value)
    bad_rows = skipping(tmp_path)
    assert read(path, bad_rows) == [{"a": 1}, {"a": 1}]
    assert bad_rows.counts == {reason: 1}
    assert bad_rows.quarantine is not None
    [kept] = map(json.loads, bad_rows.quarantine.read_text().splitlines())
    assert kept == {
        "file": str(path),
        "line": position + 1,
        "reason": reason,
        "raw": line.decode("utf-8", errors="backslashreplace"),
    }


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + GOOD, GOOD, end=b"\r\n")
    assert read(path, BadRows(OnBadRow.fail, None)) == [{"a": 1}, {"a": 1}]


def test_a_byte_order_mark_later_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"\xef\xbb\xbf" + GOOD)
    with pytest.raises(DataError, match=r":2: json: not valid JSON"):
        read(path, BadRows(OnBadRow.fail, None))


def test_utf_16_is_refused_in_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: encoding: not UTF-8"):
        read(path, BadRows(OnBadRow.fail, None))


def test_blank_lines_count_in_line_numbers_alone(tmp_path: Path) -> None:
    strict = BadRows(OnBadRow.fail, None)
    path = write(tmp_path / "rows.jsonl", b"", b" ", GOOD, b"\t", GOOD, b"", b"  ")
    assert [(line.number, line.value) for line in read_objects([path], strict)] == [(3, {"a": 1}), (5, {"a": 1})]
    with pytest.raises(DataError, match=r":3: json: not an object"):
        read(write(tmp_path / "bad.jsonl", GOOD, b"", b"3"), strict)


@pytest.mark.parametrize(("lines", "empty"), [([], True), ([b"", b" "], True), ([b"", GOOD], False), ([b"x"], False)])
def test_a_file_without_rows_is_empty(tmp_path: Path, lines: list[bytes], empty: bool) -> None:
    assert is_empty([write(tmp_path / "rows.jsonl", *lines), write(tmp_path / "rows.jsonl.gz")]) is empty


def test_a_damaged_file_is_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD)[:8])
    assert not is_empty([path])


def test_bad_rows_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad_rows, log = skipping(tmp_path), logging.getLogger("offline_align")
    for line in (b"3", b"", b"x"):
        read(write(tmp_path / "rows.jsonl", GOOD, line), bad_rows)
        bad_rows.report(log)
    assert [record.message.partition(" is")[0] for record in caplog.records] == ["1 bad row", "1 bad row"]
    assert "not an object" in caplog.records[0].message and "not an object" not in caplog.records[1].message


def test_a_last_line_without_line_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD)
    assert len(read(path, BadRows(OnBadRow.fail, None))) == 2


def test_a_truncated_gzip_file_keeps_the_rows_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [json.dumps({"a": os.urandom(40).hex()}).encode() for _ in range(4000)]
    path.write_bytes(gzip.compress(b"\n".join(rows))[:-3000])
    with pytest.raises(DataError, match="gzip: damaged or truncated"):
        read(path, BadRows(OnBadRow.fail, None))
    bad_rows = BadRows(OnBadRow.skip, None)
    found = read(path, bad_rows)
    assert 0 < len(found) < 4000
    assert found == [json.loads(row) for row in rows[: len(found)]]
    assert bad_rows.counts["gzip: damaged or truncated, the rest of the file is lost"] == 1


def test_what_is_no_gzip_file_at_all_is_bad_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"plain text\n")
    with pytest.raises(DataError, match=r":1: gzip"):
        read(path, BadRows(OnBadRow.fail, None))


def test_a_line_of_100_megabytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": "' + b"x" * 100_000_000 + b'"}', GOOD)
    assert [len(str(row["a"])) for row in read(path, BadRows(OnBadRow.fail, None))] == [100_000_000, 1]


def test_the_quarantine_file_of_an_earlier_attempt_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"1", GOOD, b"2")
    for _ in range(2):
        read(path, skipping(tmp_path))
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["raw"] for line in lines] == ["1", "2"]


def test_a_quarantine_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="quarantine"):
        read(write(tmp_path / "rows.jsonl", b"1"), skipping(tmp_path))


def test_input_paths_take_one_or_many(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)
    assert input_paths(str(a), "data.train") == [a]
    assert input_paths([str(b), a], "data.train") == [b, a]


@pytest.mark.parametrize("value", [None, 3, [], [None], {"a": 1}])
def test_input_paths_refuse_other_types(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.train="):
        input_paths(value, "data.train")


def test_input_paths_name_every_problem(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ConfigError) as error:
        input_paths([str(tmp_path / "none.jsonl"), str(tmp_path), a, a], "data.valid")
    assert [problem.rpartition(": ")[2] for problem in error.value.problems] == [
        "no such file",
        "is a folder; name the files in it",
        "given twice",
    ]
    assert all(problem.startswith("data.valid=") for problem in error.value.problems)


def test_written_rows_read_back_the_same(tmp_path: Path) -> None:
    rows = [{"b": "naïve 日本\n\u2028", "a": [1, 2.5, None, True]}, {}]
    path = tmp_path / "new" / "rows.jsonl"
    assert write_jsonl(path, rows) == 2
    assert read(path, BadRows(OnBadRow.fail, None)) == rows
    assert list(read(path, BadRows(OnBadRow.fail, None))[0]) == ["b", "a"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 2}
        raise OSError(28, "No space left on device")

    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(StorageError, match="No space left"):
        write_jsonl(path, rows())
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_no_rows_make_an_empty_file(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "rows.jsonl", []) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
