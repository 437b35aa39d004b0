"""The judge's prompt hides the methods, and only complete verdicts count."""

import pytest

from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError
from offline_align.evaluate.judges import verdict_text


def make_set(answers: list[str], set_id: str = "p1") -> list[Sample]:
    return [Sample(set_id, (Message("user", "Name a river."),), answer, {}) for answer in answers]


def test_the_request_holds_the_question_and_every_answer_in_order() -> None:
    system, user = verdict_text.request(make_set(["Po", "Rhine", "Nile"]))
    assert "Name a river." in user["content"]
    text = user["content"]
    assert text.index("Po") < text.index("Rhine") < text.index("Nile")
    assert "[Start of Assistant A's answer]\nPo\n[End of Assistant A's answer]" in text
    assert "Assistant C: <score>" in system["content"]
    assert "Assistant D" not in system["content"]


def test_the_order_is_shuffled_by_seed_and_prompt() -> None:
    answers = ["a", "b", "c", "d", "e"]
    orders = [verdict_text.shuffled(make_set(answers, f"p{k}"), seed=0) for k in range(500)]
    assert orders == [verdict_text.shuffled(make_set(answers, f"p{k}"), seed=0) for k in range(500)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert verdict_text.shuffled(make_set(answers), 0) != verdict_text.shuffled(make_set(answers), 1)
    for place in range(5):
        assert 60 < sum(order[place] == 0 for order in orders) < 140


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Both fine.\nAssistant A: 7\nAssistant B: 9", [7.0, 9.0]),
        ("**Assistant A**: 7.5/10\n- Assistant B: 9 / 10.", [7.5, 9.0]),
        ("assistant a - 1\nASSISTANT B = 10", [1.0, 10.0]),
        ("Assistant A: 3\nOn reflection:\nAssistant A: 4\nAssistant B: 5", [4.0, 5.0]),
        ("Assistant A: 7", None),
        ("Assistant A: 7\nAssistant B: 11", None),
        ("Assistant A: 0\nAssistant B: 5", None),
        ("Assistant A: 7\nAssistant B: very good", None),
        ("Assistant A: 7 or 8\nAssistant B: 5", None),
        ("", None),
    ],
)
def test_replies_are_read_in_the_order_shown(reply: str, scores: list[float] | None) -> None:
    assert verdict_text.parse(reply, 2) == scores


def test_too_many_answers_are_refused() -> None:
    assert len(verdict_text.candidate_names(26)) == 26
    with pytest.raises(ConfigError, match=r"data\.input: 27 files"):
        verdict_text.candidate_names(27)


def test_a_known_answer_is_shown_to_the_judge_and_one_answer_is_assessed_alone() -> None:
    sample = Sample("p1", (Message("user", "2 + 2?"),), "5", {"reference": "It is 4."})
    system, user = verdict_text.request([sample])
    assert "It is 4." in user["content"]
    assert verdict_text.ASSESS in system["content"]
    assert "reference" not in verdict_text.request(make_set(["a"]))[1]["content"]
    assert "correct answer" not in verdict_text.request(make_set(["a"]))[1]["content"]
