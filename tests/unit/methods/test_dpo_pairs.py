"""The pairs that DPO makes of labelled answers."""

import math

import pytest

from offline_align.config.sections import PairsMethodSection, PairsOf
from offline_align.data.records import LabelledSample, Message, PreferencePair
from offline_align.errors import DataError
from offline_align.methods import dpo

ALL, BEST_WORST = PairsMethodSection(pairs=PairsOf.all), PairsMethodSection()


def labelled(*asked: tuple[str, float], answers: list[str] | None = None) -> list[LabelledSample]:
    """Return rows with ids r0, r1, ... for prompts and rewards."""
    texts = answers or [f"answer {k}" for k in range(len(asked))]
    return [
        LabelledSample(f"r{k}", (Message("user", prompt),), texts[k], {}, 9 * reward, reward, "s")
        for k, (prompt, reward) in enumerate(asked)
    ]


def made(rows: list[LabelledSample], settings: PairsMethodSection) -> list[tuple[str, ...]]:
    return [pair.made_of for pair in dpo.pairs(rows, settings.pairs, settings.min_gap)]


def test_the_best_answer_to_a_prompt_stands_against_the_worst() -> None:
    rows = labelled(("a", 0.5), ("b", 1.0), ("a", 2.0), ("b", -1.0), ("a", -0.5), ("c", 3.0))
    (first, second) = dpo.pairs(rows, PairsOf.best_worst, 0.0)
    assert (first.chosen, first.rejected, first.margin) == ("answer 2", "answer 4", 2.5)
    assert (second.made_of, second.prompt) == (("r1", "r3"), rows[1].prompt)
    assert first.id == "r2 > r4"


def test_all_pairs_have_the_higher_reward_first() -> None:
    rows = labelled(("a", 0.5), ("a", 2.0), ("a", -0.5))
    assert made(rows, ALL) == [("r1", "r0"), ("r1", "r2"), ("r0", "r2")]


def test_equal_rewards_and_equal_answers_make_no_pair() -> None:
    assert made(labelled(("a", 1.0), ("a", 1.0)), ALL) == []
    assert made(labelled(("a", 1.0), ("a", 2.0), answers=["same", "same"]), ALL) == []


@pytest.mark.parametrize(("gap", "expected"), [(1.5, [("r1", "r0"), ("r1", "r2")]), (2.5, [("r1", "r2")]), (2.6, [])])
def test_a_smaller_gap_makes_no_pair(gap: float, expected: list[tuple[str, str]]) -> None:
    rows = labelled(("a", 0.5), ("a", 2.0), ("a", -0.5))
    assert made(rows, PairsMethodSection(pairs=PairsOf.all, min_gap=gap)) == expected


def test_given_pairs_come_first_and_are_used_as_they_are() -> None:
    pair = PreferencePair("p", (Message("user", "x"),), "yes", "no", None, {})
    found = dpo.training_pairs([*labelled(("a", 0.5), ("a", 2.0)), pair], BEST_WORST)
    assert [p.id for p in found.pairs] == ["p", "r1 > r0"]
    assert found.facts == {"pairs_given": 1, "pairs_made": 1, "labelled_rows": 2}


def test_rows_without_a_pair_are_bad_data() -> None:
    with pytest.raises(DataError, match=r"no two of the 2 labelled answers make a pair"):
        dpo.training_pairs(labelled(("a", 0.5), ("b", 2.0)), BEST_WORST)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_bad_data(reward: float) -> None:
    with pytest.raises(DataError, match=r"row r1: reward: .* is not a finite number"):
        dpo.training_pairs(labelled(("a", 0.5), ("a", reward)), BEST_WORST)
