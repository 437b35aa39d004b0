"""The report's section on a served judge."""

from typing import Any

from offline_align.evaluate.parts.served_judge import judge_section


def described(**values: Any) -> dict[str, Any]:
    return {
        "kind": "openai",
        "verdicts": 1200,
        "unreadable_verdicts": 0,
        "unreadable_reasons": {},
        "unreadable_by_answer": [0, 0],
        "asked_again": 4,
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost": None,
        "places": [],
        **values,
    }


def test_other_judges_have_no_such_part() -> None:
    assert judge_section({"kind": "human"}) is None


def test_nothing_is_said_of_reasons_if_all_was_read() -> None:
    section = judge_section(described(), ["sft", "ca"])
    assert section is not None
    assert section.findings == []
    assert [table.title for table in section.tables] == ["Usage"]


def test_missing_verdicts_are_told_by_reason_and_by_method() -> None:
    values = described(
        unreadable_verdicts=3,
        unreadable_reasons={"content filter": 2, "no readable scores": 1},
        unreadable_by_answer=[3, 1],
    )
    section = judge_section(values, ["sft", "ca"])
    assert section is not None
    assert section.findings == [
        "3 of 1,200 verdicts could not be read (content filter: 2; no readable scores: 1); "
        "the replies are in `verdicts.jsonl`."
    ]
    _, reasons, methods = section.tables
    assert reasons.rows == [["content filter", "2"], ["no readable scores", "1"]]
    assert methods.rows == [["sft", "3"], ["ca", "1"]]
    alone = judge_section(values)
    assert alone is not None
    assert len(alone.tables) == 2


def place(number: int, mean: float) -> dict[str, float | int]:
    return {"place": number, "questions": 50, "above_mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def test_position_bias_is_reported_only_beyond_its_interval() -> None:
    biased = judge_section(described(places=[place(1, 0.3), place(2, -0.05)]))
    assert biased is not None
    assert biased.findings == ["Position bias: answers in position 1 score +0.30 against the mean."]
    assert biased.tables[1].rows == [["1", "+0.30 [+0.20, +0.40]"], ["2", "-0.05 [-0.15, +0.05]"]]
    fair = judge_section(described(places=[place(1, 0.05), place(2, -0.05)]))
    assert fair is not None
    assert fair.findings == ["No position bias beyond chance."]
