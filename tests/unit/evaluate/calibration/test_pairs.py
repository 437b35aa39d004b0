"""Verdict rows and preference rows become pairs with people's verdict on the first answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import DataError
from offline_align.evaluate.calibration.pairs import both_orders, read_judged_pairs
from tests.support import real_data_dir

FAIL = BadRows(OnBadRow.fail, None)


def verdict_row(verdicts: list[str], **more: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "response_a": "A", "response_b": "B", "verdicts": verdicts, **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (verdict_row(["a-is-better"]), 1),
        (verdict_row(["b-is-slightly-better", "tie"]), -1),
        (verdict_row(["a-is-better", "b-is-better"]), 0),
        (verdict_row(["a-is-better", "b-is-better"], majority="b"), -1),
        (verdict_row([], majority="tie"), 0),
    ],
)
def test_the_majority_is_stated_or_counted(tmp_path: Path, row: dict[str, Any], expected: int) -> None:
    (pair,) = read_judged_pairs([write(tmp_path / "v.jsonl", row)], FAIL)
    assert pair.verdict == expected
    assert pair.answers == ("A", "B")


def test_chosen_answers_of_preferences_stand_first_and_second_in_turn(tmp_path: Path) -> None:
    rows = [{"id": f"p{k}", "prompt": "Why?", "chosen": "good", "rejected": "bad", "source": "hh"} for k in range(4)]
    pairs = read_judged_pairs([write(tmp_path / "p.jsonl", *rows)], FAIL)
    assert [pair.verdict for pair in pairs] == [1, -1, 1, -1]
    assert all(pair.answers[0 if pair.verdict > 0 else 1] == "good" for pair in pairs)
    assert {pair.source for pair in pairs} == {"hh"}


def test_every_pair_is_asked_in_both_orders(tmp_path: Path) -> None:
    pairs = read_judged_pairs([write(tmp_path / "v.jsonl", verdict_row(["tie"]), verdict_row(["tie"]))], FAIL)
    samples = both_orders(pairs)
    assert [sample.response for sample in samples] == ["A", "B", "B", "A"] * 2
    assert [sample.beside for sample in samples] == ["B", "A", "A", "B"] * 2
    assert len({sample.id for sample in samples}) == 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (verdict_row(["a-wins"]), "verdicts"),
        (verdict_row([]), "no majority"),
        (verdict_row([], majority="c"), "majority: not a, b or tie"),
        ({"prompt": "Why?", "response_a": "A"}, "response_a, response_b"),
        ({"prompt": "Why?", "chosen": "A"}, "rejected: missing"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"v\.jsonl:1: .*{reason}"):
        read_judged_pairs([write(tmp_path / "v.jsonl", row)], FAIL)


def test_the_real_verdicts_are_read() -> None:
    pairs = read_judged_pairs([real_data_dir() / "judge_human_verdicts.jsonl"], FAIL)
    assert len(pairs) == 996
    assert [sum(pair.verdict == v for pair in pairs) for v in (1, 0, -1)] == [448, 317, 231]
    assert len({pair.source for pair in pairs}) == 3
