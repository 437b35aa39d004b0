import json
from dataclasses import replace
from pathlib import Path

import pytest

from offline_align.data.journal import Journal
from offline_align.data.records import Message, Prompt
from offline_align.errors import StorageError
from offline_align.generate.answer_journal import Place, append_answers, merge, missing, read_answers
from offline_align.generate.requests import Completion, Request

KEY = "0123456789abcdef0123"
PROMPTS = [
    Prompt(f"p{i}", (Message("user", "Hi"),), {"prompt": "Hi", "id": f"p{i}", "benchmark": "vicuna"}) for i in range(3)
]
REQUESTS = [Request(row, sample, [1], 5) for row in range(3) for sample in range(2)]


def answer(row: int, sample: int = 0, text: str = "Yes \ud83d\ude00\n\u2028") -> Completion:
    return Completion(row, sample, text.encode("utf-16", "surrogatepass").decode("utf-16"), "stop", 4)


def test_answers_are_read_back_and_those_to_other_requests_left_out(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, KEY, 0), Journal(tmp_path, KEY, 1)
    append_answers(first, [answer(0), answer(1), answer(7)])
    append_answers(second, [answer(2, 1), answer(0)])
    expected = {(0, 0, 0): answer(0), (1, 0, 0): answer(1), (2, 0, 1): answer(2, 1)}
    assert read_answers(first, REQUESTS) == read_answers(second, REQUESTS) == expected


def test_token_details_are_read_back_and_cost_nothing_elsewhere(tmp_path: Path) -> None:
    plain, whole = Journal(tmp_path, KEY, 0), Journal(tmp_path, KEY, 1)
    details = replace(answer(1), token_ids=(5, 2), log_probs=(-0.6931471824645996, -1e-30))
    append_answers(plain, [answer(0)])
    append_answers(whole, [details])
    assert read_answers(plain, REQUESTS) == {(0, 0, 0): answer(0), (1, 0, 0): details}
    assert set(plain.read()[0]) == {"row", "sample_index", "response", "finish_reason", "num_tokens", "variant"}


def test_missing_requests_keep_their_order() -> None:
    done = {(0, 0, 0): answer(0), (1, 0, 1): answer(1, 1)}
    assert [(r.row, r.sample_index) for r in missing(REQUESTS, done)] == [(0, 1), (1, 0), (2, 0), (2, 1)]


def test_merging_keeps_columns_and_order(tmp_path: Path) -> None:
    done = {(row, 0, sample): answer(row, sample) for row in (2, 0, 1) for sample in (1, 0)}
    path = tmp_path / "generations.jsonl"
    assert merge(path, PROMPTS, REQUESTS, done, ["<rm_score>5.0"]) == 6
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["id"], row["sample_index"]) for row in rows] == [(f"p{i}", k) for i in range(3) for k in range(2)]
    assert rows[0] == {
        "id": "p0",
        "prompt": "Hi",
        "benchmark": "vicuna",
        "response": "Yes 😀\n\u2028",
        "finish_reason": "stop",
        "condition": "<rm_score>5.0",
        "sample_index": 0,
    }


def test_columns_of_other_answers_do_not_come_along(tmp_path: Path) -> None:
    """With them, `label` would score the pair again, and `fa` would take the other answer's reward."""
    path = tmp_path / "generations.jsonl"
    columns = {"prompt": "Hi", "chosen": "a", "rejected": "b", "reward": 1.0, "reward_raw": 2.0, "source": "x"}
    merge(path, [Prompt("p", PROMPTS[0].prompt, columns)], REQUESTS[:1], {(0, 0, 0): answer(0, text="c")}, [""])
    row = json.loads(path.read_text(encoding="utf-8"))
    assert list(row) == ["id", "prompt", "source", "response", "finish_reason", "condition"]
    assert row["response"] == "c"


def test_single_answers_have_no_sample_index_and_a_null_condition(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    merge(path, [Prompt("f:1", PROMPTS[0].prompt, {"prompt": "Hi"})], REQUESTS[:1], {(0, 0, 0): answer(0)}, [""])
    row = json.loads(path.read_text(encoding="utf-8"))
    assert row["id"] == "f:1"
    assert row["condition"] is None
    assert "sample_index" not in row


@pytest.mark.parametrize("places", [[(0, 0, 0)], [(0, 0, 0), (0, 0, 1), (7, 0, 0)]])
def test_another_set_of_answers_is_never_merged(tmp_path: Path, places: list[Place]) -> None:
    done = {place: answer(place[0], place[2]) for place in places}
    with pytest.raises(StorageError, match="missing"):
        merge(tmp_path / "generations.jsonl", PROMPTS, REQUESTS[:2], done, [""])
    assert not (tmp_path / "generations.jsonl").exists()


def test_answers_under_several_conditions_stand_side_by_side(tmp_path: Path) -> None:
    requests = [Request(row, 0, [1], 5, variant) for row in range(2) for variant in range(2)]
    journal = Journal(tmp_path, KEY, 0)
    append_answers(
        journal, (Completion(r.row, 0, f"{r.row}{r.variant}", "stop", 1, r.variant) for r in reversed(requests))
    )
    merge(tmp_path / "g.jsonl", PROMPTS, requests, read_answers(journal, requests), ["<-1>", "<1>"])
    rows = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["response"], row["condition"]) for row in rows] == [
        *[("00", "<-1>"), ("01", "<1>"), ("10", "<-1>"), ("11", "<1>")],
    ]
