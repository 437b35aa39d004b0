"""Rows: which rows are accepted as which kind, and the reason for every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.records import (
    BadRows,
    LabelledSample,
    Message,
    PreferencePair,
    Prompt,
    Sample,
    read_rows,
    read_rows_and_pairs,
    reject_rows,
)
from offline_align.errors import DataError
from tests.support import real_data_dir

SAMPLE: dict[str, Any] = {"id": "s", "prompt": "Why?", "response": "Because.", "source": "here"}
PAIR: dict[str, Any] = {"id": "p", "prompt": "Why?", "chosen": "Because.", "rejected": "No."}
LABELLED: dict[str, Any] = SAMPLE | {"reward_raw": 3, "reward": -0.5, "source_id": "p"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}
STRICT = BadRows(OnBadRow.fail, None)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path: Path, kind: type, *rows: dict[str, Any]) -> str:
    """Return the reason why the last of the rows is refused."""
    with pytest.raises(DataError) as error:
        list(read_rows([write(path, *rows)], kind, STRICT))
    start, _, reason = str(error.value).partition(f":{len(rows)}: ")
    assert start == str(path)
    return reason.partition(";")[0]


def test_every_kind_keeps_its_columns_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    user = (Message("user", "Why?"),)
    assert list(read_rows([write(path, SAMPLE)], Sample, STRICT)) == [Sample("s", user, "Because.", SAMPLE)]
    [pair] = read_rows([write(path, PAIR | {"margin": 2})], PreferencePair, STRICT)
    assert pair == PreferencePair("p", user, "Because.", "No.", 2.0, PAIR | {"margin": 2})
    [labelled] = read_rows([write(path, LABELLED)], LabelledSample, STRICT)
    assert labelled == LabelledSample("s", user, "Because.", LABELLED, 3.0, -0.5, "p")
    assert list(labelled.columns) == list(LABELLED)
    [prompt] = read_rows([write(path, {"prompt": [SYSTEM, USER, ASSISTANT, USER]})], Prompt, STRICT)
    assert [message.role for message in prompt.prompt] == ["system", "user", "assistant", "user"]
    assert prompt.id == "rows.jsonl:1"


def test_integers_are_ids_as_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", LABELLED | {"id": 1, "source_id": 0}, LABELLED | {"id": -2})
    first, second = read_rows([path], LabelledSample, STRICT)
    assert (first.id, first.source_id, second.id) == ("1", "0", "-2")
    assert first.columns == LABELLED | {"id": "1", "source_id": "0"}
    assert list(first.columns) == list(LABELLED)
    assert refusal(path, Prompt, {"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}).startswith("id: duplicate id")


def test_rows_are_rejected_by_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"no": "row"}, SAMPLE, PAIR, SAMPLE | {"response": "other"}, {"prompt": "b"})
    reasons = {"p": "second", "s": "first", "absent": "none"}
    with pytest.raises(DataError, match=rf"^{path}:2: first; fix the row"):
        reject_rows([path], Sample, reasons, STRICT, and_pairs=True)
    skipping = BadRows(OnBadRow.skip, tmp_path / "quarantine.jsonl")
    reject_rows([path], Sample, reasons, skipping, and_pairs=True)
    quarantined = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in quarantined] == [
        (str(path), 2, "first"),
        (str(path), 3, "second"),
    ]
    assert json.loads(quarantined[0]["raw"]) == SAMPLE


def test_ids_are_those_of_the_kind_that_was_read(tmp_path: Path) -> None:
    answer = LABELLED | {"id": "x/0", "finish_reason": "stop", "sample_index": 0}
    path = write(tmp_path / "rows.jsonl", answer)
    (labelled,), (sample,) = (read_rows([path], kind, STRICT) for kind in (LabelledSample, Sample))
    assert (labelled.id, sample.id) == ("x/0", "x/0/0")
    for row in (labelled, sample):
        with pytest.raises(DataError, match=r"rows.jsonl:1: no;"):
            reject_rows([path], type(row), {row.id: "no"}, STRICT)
    reject_rows([path], LabelledSample, {sample.id: "no"}, STRICT)


def test_nothing_is_read_again_if_nothing_is_rejected(tmp_path: Path) -> None:
    reject_rows([tmp_path / "absent.jsonl"], Sample, {}, STRICT, and_pairs=True)


def test_samples_and_pairs_are_told_apart_row_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", SAMPLE, PAIR)
    assert [type(row) for row in read_rows_and_pairs([path], Sample, STRICT)] == [Sample, PreferencePair]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        (Sample, {"response": "x"}, "prompt: missing"),
        (Sample, SAMPLE | {"prompt": None}, "prompt: null"),
        (Sample, SAMPLE | {"prompt": 3}, "prompt: not a string or a list of messages"),
        (Sample, SAMPLE | {"prompt": " \n"}, "prompt: empty"),
        (Sample, SAMPLE | {"prompt": "a\0b"}, "prompt: contains a NUL character"),
        (Sample, {"prompt": "x"}, "response: missing"),
        (Sample, SAMPLE | {"response": None}, "response: null"),
        (Sample, SAMPLE | {"response": 1}, "response: not a string"),
        (Sample, SAMPLE | {"response": ""}, "response: empty"),
        (Sample, SAMPLE | {"response": "\t "}, "response: empty"),
        (Sample, SAMPLE | {"id": True}, "id: not a string"),
        (Sample, SAMPLE | {"id": ""}, "id: empty"),
        (Sample, SAMPLE | {"prompt": []}, "prompt: no user message"),
        (Sample, SAMPLE | {"prompt": [SYSTEM]}, "prompt: no user message"),
        (Sample, SAMPLE | {"prompt": ["Hi"]}, "prompt: a message is not an object"),
        (Sample, SAMPLE | {"prompt": [{"content": "Hi"}]}, "prompt: role is not system, user or assistant"),
        (Sample, SAMPLE | {"prompt": [{"role": "user"}]}, "prompt: content of a message: not a string"),
        (Sample, SAMPLE | {"prompt": [USER | {"content": " "}]}, "prompt: content of a message: empty"),
        (
            Sample,
            SAMPLE | {"prompt": [USER | {"role": "tool"}]},
            "prompt: role is not system, user or assistant",
        ),
        (Sample, SAMPLE | {"prompt": [USER, ASSISTANT]}, "prompt: the last message is not from the user"),
        (
            Sample,
            SAMPLE | {"prompt": [USER, USER]},
            "prompt: roles do not alternate between user and assistant",
        ),
        (
            Sample,
            SAMPLE | {"prompt": [USER, SYSTEM, USER]},
            "prompt: roles do not alternate between user and assistant",
        ),
        (
            Sample,
            SAMPLE | {"prompt": [ASSISTANT, USER]},
            "prompt: roles do not alternate between user and assistant",
        ),
        (PreferencePair, PAIR | {"rejected": "Because."}, "rejected: the same as chosen"),
        (PreferencePair, {"prompt": "x", "chosen": "y"}, "rejected: missing"),
        (PreferencePair, {"prompt": "x", "rejected": "y"}, "chosen: missing"),
        (PreferencePair, PAIR | {"margin": "2"}, "margin: not a number"),
        (PreferencePair, PAIR | {"margin": True}, "margin: not a number"),
        (LabelledSample, LABELLED | {"reward": True}, "reward: not a number"),
        (LabelledSample, LABELLED | {"reward": "1.5"}, "reward: not a number"),
        (LabelledSample, LABELLED | {"reward": None}, "reward: null"),
        (LabelledSample, LABELLED | {"reward_raw": 10**400}, "reward_raw: number out of range"),
        (LabelledSample, SAMPLE, "reward_raw: missing"),
        (LabelledSample, LABELLED | {"source_id": 1.0}, "source_id: not a string"),
    ],
)
def test_the_reason_for_a_refusal(
    tmp_path: Path, kind: type[Sample] | type[PreferencePair], row: dict[str, Any], reason: str
) -> None:
    good = {Sample: SAMPLE, PreferencePair: PAIR, LabelledSample: LABELLED}[kind] | {"id": "good"}
    assert refusal(tmp_path / "rows.jsonl", kind, good, row) == reason
    bad_rows = BadRows(OnBadRow.skip, None)
    [kept] = read_rows([write(tmp_path / "rows.jsonl", row, good)], kind, bad_rows)
    assert kept.columns == good
    assert bad_rows.counts == {reason: 1}


def test_half_a_pair_is_no_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", SAMPLE | {"rejected": "x"})
    with pytest.raises(DataError, match=r":1: chosen: missing"):
        list(read_rows_and_pairs([path], Sample, STRICT))


def test_an_id_names_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert refusal(path, Sample, SAMPLE, SAMPLE) == "id: duplicate id"
    other = SAMPLE | {"response": "Why not?"}
    assert refusal(path, Sample, SAMPLE, other) == "id: duplicate id, with other content"


def test_files_of_the_same_name_give_different_ids(tmp_path: Path) -> None:
    row = {"prompt": "x", "response": "y"}
    paths = [tmp_path / folder / "rows.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        write(path, row)
    assert [r.id for r in read_rows(paths, Sample, STRICT)] == [f"{path}:1" for path in paths]


def test_nothing_to_read_is_bad_data(tmp_path: Path) -> None:
    empty, full = write(tmp_path / "empty.jsonl"), write(tmp_path / "full.jsonl", SAMPLE)
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row"):
        list(read_rows([empty], Sample, STRICT))
    assert len(list(read_rows([empty, full], Sample, STRICT))) == 1
    with pytest.raises(DataError, match="no usable row"):
        list(read_rows([full], PreferencePair, BadRows(OnBadRow.skip, None)))


def test_real_rows_are_all_accepted() -> None:
    folder = real_data_dir()
    samples = read_rows([folder / "sft_train.jsonl", folder / "sft_valid.jsonl"], Sample, STRICT)
    assert len(list(samples)) == 6581
    names = ("preferences_train.jsonl", "preferences_valid.jsonl")
    assert len(list(read_rows([folder / name for name in names], PreferencePair, STRICT))) == 2547
    assert len(list(read_rows([folder / "eval_prompts.jsonl"], Prompt, STRICT))) == 160
