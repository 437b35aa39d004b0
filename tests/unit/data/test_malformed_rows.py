"""Every kind of malformed row, in every form, on the first, a middle and the last line, plain and gzipped."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import write_jsonl
from offline_align.data.records import (
    BadRows,
    LabelledSample,
    PreferencePair,
    Prompt,
    Sample,
    read_rows,
    read_rows_and_pairs,
)
from offline_align.errors import DataError

Row = dict[str, Any]
PROMPT: Row = {"id": "bad", "prompt": "Why?", "extra": [1]}
FORMS: dict[type[Any], Row] = {
    Sample: PROMPT | {"response": "Because."},
    PreferencePair: PROMPT | {"chosen": "Because.", "rejected": "No."},
    LabelledSample: PROMPT | {"response": "Because.", "reward_raw": 3, "reward": 0.5, "source_id": "s"},
    Prompt: PROMPT,
}
TEXTS = {
    Sample: ["prompt", "response"],
    PreferencePair: ["prompt", "chosen", "rejected"],
    LabelledSample: ["prompt", "response", "source_id"],
    Prompt: ["prompt"],
}
DEEP = b"[" * 20_000 + b"]" * 20_000
OBJECTS = b'{"a":' * 20_000 + b"1" + b"}" * 20_000

# Damage to a whole line, the same in every form: a function from a good line to a bad one, and the reason.
LINES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "invalid UTF-8": (lambda line: line.replace(b"Why?", b"Why\xff"), "encoding: not UTF-8"),
    "overlong UTF-8": (lambda line: line.replace(b"Why?", b"\xc0\xaf"), "encoding: not UTF-8"),
    "Latin-1": (lambda line: line.replace(b"Why?", "né".encode("latin-1")), "encoding: not UTF-8"),
    "UTF-16": (lambda line: line.decode().encode("utf-16-le"), "json: not valid JSON"),
    "NUL byte": (lambda line: line.replace(b"Why?", b"W\0?"), "json: not valid JSON"),
    "byte order mark inside": (lambda line: line[:1] + b"\xef\xbb\xbf" + line[1:], "json: not valid JSON"),
    "control character": (lambda line: line.replace(b"Why?", b"W\x01?"), "json: not valid JSON"),
    "torn": (lambda line: line[:-7], "json: not valid JSON"),
    "two objects": (lambda line: line + line, "json: more than one value on the line"),
    "trailing comma": (lambda line: line + b",", "json: more than one value on the line"),
    "single quotes": (lambda line: line.replace(b'"', b"'"), "json: not valid JSON"),
    "array": (lambda line: b"[" + line + b"]", "json: not an object"),
    "string": (lambda line: b'"row"', "json: not an object"),
    "number": (lambda line: b"3", "json: not an object"),
    "null": (lambda line: b"null", "json: not an object"),
    "duplicate key": (lambda line: b'{"prompt": "x", ' + line[1:], "json: a key occurs twice in an object"),
    "lone surrogate": (lambda line: line.replace(b"Why?", b"\\ud800"), "encoding: lone surrogate"),
    "lone surrogate in a further column": (lambda line: line.replace(b"[1]", b'"\\udc01"'), "encoding: lone surrogate"),
    "NaN": (lambda line: line.replace(b"[1]", b"NaN"), "json: NaN and Infinity are not numbers of JSON"),
    "1e400": (lambda line: line.replace(b"[1]", b"1e400"), "json: number out of range"),
    "deep arrays": (lambda line: line.replace(b"[1]", DEEP), "json: nested too deeply"),
    "deep objects": (lambda line: line.replace(b"[1]", OBJECTS), "json: nested too deeply"),
    "deep prompt": (lambda line: line.replace(b'"Why?"', DEEP), "json: nested too deeply"),
    "long garbage": (lambda line: b"x" * 100_000, "json: not valid JSON"),
}

# Wrong fields of every form: changes to a good row, and the reason; None removes the field.
FIELDS: dict[str, tuple[Row, str]] = {
    "prompt is a number": ({"prompt": 3}, "prompt: not a string or a list of messages"),
    "no messages": ({"prompt": []}, "prompt: no user message"),
    "unknown role": ({"prompt": [{"role": "tool", "content": "x"}]}, "prompt: role is not system, user or assistant"),
    "role is a list": ({"prompt": [{"role": ["user"], "content": "x"}]}, "prompt: role is not system, user or"),
    "turns out of order": (
        {"prompt": [{"role": r, "content": "x"} for r in ("user", "user")]},
        "prompt: roles do not alternate",
    ),
    "answered already": (
        {"prompt": [{"role": r, "content": "x"} for r in ("user", "assistant")]},
        "prompt: the last message is not from the user",
    ),
    "empty content": ({"prompt": [{"role": "user", "content": ""}]}, "prompt: content of a message: empty"),
    "id is a fraction": ({"id": 7.5}, "id: not a string"),
    "id is a boolean": ({"id": True}, "id: not a string"),
    "id is a list": ({"id": ["x"]}, "id: not a string"),
    "id is empty": ({"id": ""}, "id: empty"),
}
NUMBERS = [
    ("NaN", "json: NaN and Infinity are not numbers of JSON"),
    ("-Infinity", "json: NaN and Infinity are not numbers of JSON"),
    ("1e400", "json: number out of range"),
    ("1" + "0" * 400, "number out of range"),
    ("9" * 5000, "json: not valid JSON"),
    ("true", "not a number"),
    ('"1.5"', "not a number"),
    ("[1.5]", "not a number"),
]


def cases() -> list[Any]:
    """Return named cases (form, bad line, reason)."""
    found = []
    for kind, good in FORMS.items():
        line = json.dumps(good).encode()
        named = {name: (damage(line), reason) for name, (damage, reason) in LINES.items()}
        for name, (change, reason) in FIELDS.items():
            named[name] = (json.dumps(good | change).encode(), reason)
        for field in TEXTS[kind]:
            without = {k: v for k, v in good.items() if k != field}
            named[f"{field} missing"] = (json.dumps(without).encode(), f"{field}: missing")
            for name, value, reason in [
                ("null", None, "null"),
                ("boolean", True, "not a string"),
                ("object", {"a": 1}, "not a string"),
                ("empty", "", "empty"),
                ("white", " \t\n\u3000", "empty"),
                ("NUL", "a\0b", "contains a NUL character"),
            ]:
                named[f"{field} {name}"] = (json.dumps(good | {field: value}).encode(), f"{field}: {reason}")
        for field in {LabelledSample: ["reward", "reward_raw"], PreferencePair: ["margin"]}.get(kind, []):
            for text, reason in NUMBERS:
                shown = reason if reason.startswith("json") else f"{field}: {reason}"
                bad = json.dumps(good | {field: "@"}).replace('"@"', text).encode()
                named[f"{field}={text[:9]}"] = (bad, shown)
        if kind is PreferencePair:
            named["margin beyond float32"] = (json.dumps(good | {"margin": 1e39}).encode(), "margin: number out of")
            same = good | {"rejected": good["chosen"]}
            named["chosen = rejected"] = (json.dumps(same).encode(), "rejected: the same as chosen")
        found += [pytest.param(kind, bad, reason, id=f"{kind.__name__}: {n}") for n, (bad, reason) in named.items()]
    return found


def good_lines(kind: type[Any], count: int) -> list[bytes]:
    return [json.dumps(FORMS[kind] | {"id": f"good {i}"}).encode() for i in range(count)]


def written(path: Path, lines: list[bytes]) -> Path:
    content = b"\n".join([*lines, b""])
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("kind", "bad", "reason"), cases())
def test_a_malformed_row_is_named_or_left_out(tmp_path: Path, kind: type[Any], bad: bytes, reason: str) -> None:
    for at, name in ((0, "rows.jsonl"), (1, "rows.jsonl.gz"), (2, "rows.jsonl"), (2, "rows.jsonl.gz")):
        lines = good_lines(kind, 2)
        clean = list(read_rows([written(tmp_path / "clean.jsonl", lines)], kind, BadRows(OnBadRow.fail, None)))
        lines.insert(at, bad)
        path = written(tmp_path / name, lines)
        with pytest.raises(DataError) as error:
            list(read_rows([path], kind, BadRows(OnBadRow.fail, None)))
        said = str(error.value)
        assert said.startswith(f"{path}:{at + 1}: {reason}")
        assert "\n" not in said and len(said) < 1000
        bad_rows = BadRows(OnBadRow.skip, tmp_path / "quarantine.jsonl")
        assert list(read_rows([path], kind, bad_rows)) == clean
        assert sum(bad_rows.counts.values()) == 1
        [kept] = (tmp_path / "quarantine.jsonl").read_text("ascii").splitlines()
        entry = json.loads(kept)
        assert (entry["file"], entry["line"]) == (str(path), at + 1)
        assert entry["reason"].startswith(reason)
        assert entry["raw"] == bad.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("same", [True, False])
def test_the_second_row_of_an_id_is_the_bad_one(tmp_path: Path, kind: type[Any], same: bool) -> None:
    lines = good_lines(kind, 3)
    again = lines[0] if same else lines[0].replace(b"Why?", b"How?")
    reason = "id: duplicate id" + ("" if same else ", with other content")
    for at in (1, 3):
        bad_rows = BadRows(OnBadRow.skip, None)
        path = written(tmp_path / "rows.jsonl.gz", [*lines[:at], again, *lines[at:]])
        assert [row.id for row in read_rows([path], kind, bad_rows)] == ["good 0", "good 1", "good 2"]
        assert bad_rows.counts == {reason: 1}


def test_answers_of_a_pair_take_ids_too(tmp_path: Path) -> None:
    """`label` makes two rows from a pair, and ids in its output must be unique."""
    pair, sample = FORMS[PreferencePair] | {"id": "a"}, FORMS[Sample] | {"id": "a/chosen"}
    for rows in ([pair, sample], [sample, pair]):
        path = tmp_path / "rows.jsonl"
        write_jsonl(path, rows)
        with pytest.raises(DataError, match=r":2: id: duplicate id, with other content"):
            list(read_rows_and_pairs([path], Sample, BadRows(OnBadRow.fail, None)))


@pytest.mark.parametrize("kind", FORMS)
def test_harmless_oddities_change_nothing(tmp_path: Path, kind: type[Any]) -> None:
    strict = BadRows(OnBadRow.fail, None)
    lines = good_lines(kind, 3)
    clean = list(read_rows([written(tmp_path / "clean.jsonl", lines)], kind, strict))
    for name, content in {
        "crlf.jsonl": b"\r\n".join(lines) + b"\r\n",
        "mark.jsonl": b"\xef\xbb\xbf" + b"\n".join(lines),
        "blank_end.jsonl": b"\n".join(lines) + b"\n\n \n\n",
        "blank_between.jsonl": b"\n\n \n".join(lines),
        "spaces.jsonl": b"\n".join(b"  " + line + b"\t" for line in lines),
        "two_members.jsonl.gz": gzip.compress(lines[0] + b"\n") + gzip.compress(b"\n".join(lines[1:])),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert list(read_rows([path], kind, strict)) == clean, name


@pytest.mark.parametrize("kind", FORMS)
def test_long_lines_and_special_tokens_are_text(tmp_path: Path, kind: type[Any]) -> None:
    text = "</s><|im_end|><s>[INST]\u2028\ufeff" + "é" * 100_000
    row = FORMS[kind] | dict.fromkeys(TEXTS[kind], text) | ({"rejected": "No."} if kind is PreferencePair else {})
    path = written(tmp_path / "rows.jsonl", [json.dumps(row, ensure_ascii=False).encode()])
    [read] = read_rows([path], kind, BadRows(OnBadRow.fail, None))
    assert read.columns == row
    write_jsonl(tmp_path / "again.jsonl", [read.columns])
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_what_is_read_can_be_written_however_deep_it_is(tmp_path: Path) -> None:
    """A row at the reader's limit must not fail hours later, when a stage writes its output."""

    def survives(depth: int) -> bool:
        nested = b"[" * depth + b"]" * depth
        path = written(tmp_path / "rows.jsonl", [b'{"prompt": "x", "extra": ' + nested + b"}"])
        try:
            rows = list(read_rows([path], Prompt, BadRows(OnBadRow.fail, None)))
        except DataError:
            return False

        def deeper(levels: int) -> None:
            if levels:
                deeper(levels - 1)
            else:
                write_jsonl(tmp_path / "out.jsonl", ({"id": row.id, **row.columns} for row in rows))

        deeper(400)
        return True

    low, high = 1, 100_000
    assert survives(low) and not survives(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if survives(middle) else (low, middle)
    assert low > 500


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)[:-4], b"\x1f\x8b"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_without_a_row(tmp_path: Path, kind: type[Any], content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for on_bad_row in OnBadRow:
        with pytest.raises(DataError) as error:
            list(read_rows([path], kind, BadRows(on_bad_row, None)))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
