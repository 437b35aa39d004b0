"""Every row read and every row made from it is accounted for, whatever the rows are."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow, PrepareSection, Rated
from offline_align.data.adapters.columns import TEXTS
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.jsonl import BadRows
from offline_align.data.preparation import prepare_rows, report
from offline_align.data.sources import input_sources
from offline_align.errors import DataError

SIDES = ("chosen", "rejected")
STATES = ("ready_for_export", "ready_for_export", "growing", None)
SPOILT = [None, "", " ", 3, [], {}, "some text", [{"input": "a"}], {"input": ["a"], "output": []}]
GARBAGE = ["{", "[1]", "\x00", '{"a": NaN}']


def rows_of_every_form(chance: random.Random) -> list[dict[str, Any]]:
    def text() -> str:
        return f"words {chance.randrange(40)}"

    def message(parents: list[str]) -> dict[str, Any]:
        fields = {
            "message_id": text(),
            "parent_id": chance.choice(parents),
            "text": text(),
            "rank": chance.randrange(3),
        }
        return fields | {"role": chance.choice(["prompter", "assistant"]), "deleted": chance.random() < 0.1}

    def tree(depth: int) -> dict[str, Any]:
        replies = [tree(depth - 1) for _ in range(chance.randrange(3))] if depth else []
        return message([""]) | {"role": ["assistant", "prompter"][depth % 2], "replies": replies}

    def dialogue(turns: int) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": chance.choice([text(), ""])} for n in range(turns)]

    instances = [{"input": text(), "output": text()} for _ in range(chance.randrange(3))]
    return [
        {side: f"\n\nHuman: {text()}\n\nAssistant: {text()}" for side in SIDES},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": f"\n\nHuman: a\n\nAssistant: {text()}"},
        {"instruction": text(), "context": text(), "response": text()},
        {"inputs": text(), "targets": text()},
        {"instruction": text(), "instances": instances},
        {"instruction": text(), "instances": {"input": [text()], "output": [text()]}},
        {"instruction": text(), "input": text(), "output": text()},
        {"prompt": text(), "completion": text()},
        {"prompt": text(), "completion": text(), "label": chance.random() < 0.5},
        {"messages": dialogue(chance.randrange(6)), "score": chance.randrange(3)},
        {"conversations": dialogue(chance.randrange(6)), "kto_tag": chance.choice([True, False, None])},
        {"chosen": dialogue(2), "rejected": dialogue(2), "score_chosen": 2, "score_rejected": chance.randrange(4)},
        {"question": text(), "chosen": text(), "rejected": chance.choice([text(), None])},
        {"prompt": text(), "answers": [{"answer": text(), "rank": chance.randrange(3)} for _ in range(3)]},
        {"instruction": text(), "completions": [{"response": text(), "score": chance.randrange(3)} for _ in range(3)]},
        *({"prompt": "words 1", "response": text(), "rating": chance.randrange(3), "id": text()} for _ in range(3)),
        {"text": f"Human: {text()}\n\nAssistant: {text()}"},
        {"prompt": text(), "response": text(), "id": text()},
        {"prompt": text(), "chosen": text(), "rejected": text(), "id": text()},
        {"prompt": tree(3), "tree_state": chance.choice(STATES)},
        *(message([f"words {chance.randrange(40)}", ""]) | {"tree_state": chance.choice(STATES)} for _ in range(5)),
    ]


def prepared(tmp_path: Path, lines: list[str], rated: Rated | None = None) -> tuple[InputCounts, dict[str, Any]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    bad_rows = BadRows(OnBadRow.skip, tmp_path / "quarantine.jsonl")
    result = prepare_rows(input_sources(str(path), "data.input"), PrepareSection(rated=rated), 0, bad_rows)
    [counts] = result.inputs
    assert counts.rows_kept == sum(len(rows) for rows in result.files.values())
    assert counts.bad_rows == bad_rows.counts.total()
    return counts, report(result, bad_rows)["inputs"][0]


@pytest.mark.parametrize("rated", [None, *Rated])
@pytest.mark.parametrize("seed", range(10))
def test_the_counts_of_any_rows_add_up(tmp_path: Path, seed: int, rated: Rated | None) -> None:
    chance = random.Random(seed)
    rows = [row for _ in range(12) for row in rows_of_every_form(chance)]
    for row in rows:
        if chance.random() < 0.3:
            row[chance.choice([*row, *TEXTS])] = chance.choice(SPOILT)
    chance.shuffle(rows)
    lines = [json.dumps(row) for row in rows]
    for line in GARBAGE:
        lines.insert(chance.randrange(len(lines)), line)
    counts, found = prepared(tmp_path, [*lines, "x"], rated)
    assert counts.dropped.total() and counts.bad_rows >= 5 and counts.rows_kept
    assert counts.rows_read - counts.rows_used + counts.rows_made == (
        counts.rows_kept + counts.dropped.total() + counts.bad_rows
    )
    assert all(number > 0 for number in counts.dropped.values())
    assert 0 < counts.rows_used <= counts.rows_read and counts.rows_read >= len(lines) + 1
    assert found["dropped"] == dict(counts.dropped) and found["rows_read"] == counts.rows_read


def test_each_row_of_a_form_with_one_row_each_is_kept_dropped_or_bad(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": "b", "response": "c"},
        {"instruction": "A", "input": "b ", "response": "c"},
        {"instruction": "a", "context": "b", "response": " "},
        {"instruction": "a", "input": "b", "context": "c", "response": "d"},
        {"instruction": "a", "instances": []},
        {"question": "a"},
    ]
    _, found = prepared(tmp_path, [json.dumps(row) for row in rows] + ["not JSON"])
    assert found == {
        "name": "rows.jsonl",
        "forms": {"dolly": 3},
        "rows_read": 7,
        "rows_used": 3,
        "rows_made": 3,
        "rows_kept": 1,
        "bad_rows": 3,
        "dropped": {
            "duplicate of an earlier row": 1,
            "response: empty": 1,
            "self_instruct: a task without an instance": 1,
        },
    }


@pytest.mark.parametrize("nest", [False, True])
def test_a_tree_counts_as_its_messages(tmp_path: Path, nest: bool) -> None:
    flat = [
        {"message_id": i, "parent_id": p, "role": r, "text": i, "rank": 0, "tree_state": "ready_for_export"}
        for i, p, r in [("q", None, "prompter"), ("a", "q", "assistant"), ("open", "a", "prompter")]
    ]
    nested = flat[0] | {"replies": [flat[1] | {"replies": [flat[2]]}]}
    rows = [{"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": nested}] if nest else flat
    counts, _ = prepared(tmp_path, [json.dumps(row) for row in rows])
    assert (counts.rows_read, counts.rows_used, counts.rows_made, counts.rows_kept) == (3, 2, 1, 1)
    assert counts.dropped.total() == 1


def test_an_input_without_a_usable_row_says_what_became_of_its_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no usable row; there is no row at all"):
        prepared(tmp_path, [""])
    lines = [json.dumps({"instruction": "a", "instances": []})] * 2
    with pytest.raises(DataError, match=r"no usable row; 2 self_instruct: a task without an instance; 1 json: "):
        prepared(tmp_path, [*lines, "x"])


@pytest.mark.parametrize(("name", "hint"), [("ratings", "did you mean rating?"), ("x", "the columns are prompt, ")])
def test_a_misspelt_score_column_is_named(tmp_path: Path, name: str, hint: str) -> None:
    path = tmp_path / "rated.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b", "rating": 3}) + "\n")
    settings = PrepareSection(score_column=name)
    with pytest.raises(DataError, match=f"prepare.score_column={name}: no such column; {re.escape(hint)}"):
        prepare_rows(input_sources(str(path), "data.input"), settings, 1, BadRows(OnBadRow.fail, None))
