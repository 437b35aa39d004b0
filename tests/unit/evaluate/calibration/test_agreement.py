"""Agreement with people against values computed by hand."""

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection
from offline_align.data.records import Message
from offline_align.evaluate.calibration.agreement import Verdicts, agreement, people_with_each_other
from offline_align.evaluate.calibration.pairs import JudgedPair

SETTINGS = EvaluateSection(bootstrap_samples=200)


def pair(verdict: int, answers: tuple[str, str] = ("aa", "b"), prompt: str = "p", source: str = "s") -> JudgedPair:
    return JudgedPair("id", (Message("user", prompt),), answers, verdict, (verdict,), source)


def judged(people: list[int], forward: list[float], backward: list[float] | None = None) -> Verdicts:
    pairs = [pair(verdict, prompt=f"p{k}") for k, verdict in enumerate(people)]
    return Verdicts(pairs, np.array(forward), np.array(forward if backward is None else backward))


def test_accuracy_counts_a_tie_of_the_judge_as_half_and_adds_up_with_its_swap() -> None:
    found = agreement(judged([1, 1, -1, -1, 0], [2.0, -1.0, -3.0, 0.0, 5.0]), SETTINGS, 0)
    assert found["accuracy"]["mean"] == pytest.approx(2.5 / 4)
    assert found["accuracy"]["mean"] + found["swapped_accuracy"]["mean"] == pytest.approx(1)
    assert (found["decided_pairs"], found["people_ties"]) == (4, 1)
    assert found["judge_ties"]["mean"] == pytest.approx(1 / 5)


def test_kappa_is_that_of_the_textbook() -> None:
    # 20 both a, 5 judge a and people b, 10 judge b and people a, 15 both b: kappa = 0.4.
    table = [(1, 1)] * 20 + [(1, -1)] * 5 + [(-1, 1)] * 10 + [(-1, -1)] * 15
    found = agreement(judged([p for _, p in table], [float(j) for j, _ in table]), SETTINGS, 0)
    assert found["kappa"]["mean"] == pytest.approx(0.4)
    assert found["kappa"]["low"] < 0.4 < found["kappa"]["high"]


def test_ties_of_people_count_in_the_kappa_of_three_verdicts() -> None:
    people, judge = [1, 1, -1, 0, 0], [1.0, 1.0, -1.0, 0.0, 1.0]
    # Observed 4/5; expected (3*2 + 1*1 + 1*2) / 25.
    expected = (0.8 - 9 / 25) / (1 - 9 / 25)
    assert agreement(judged(people, judge), SETTINGS, 0)["kappa_with_ties"]["mean"] == pytest.approx(expected)


def test_position_bias_shows_in_both_orders_and_cancels_in_the_verdict() -> None:
    # The first shown always gains 2: margins 2 + m forward, m - 2 backward.
    merit = [1.0, -1.0, 3.0, -3.0]
    verdicts = judged([1, -1, 1, -1], [m + 2 for m in merit], [m - 2 for m in merit])
    found = agreement(verdicts, SETTINGS, 0)
    assert found["accuracy"]["mean"] == 1.0
    assert found["same_in_both_orders"]["mean"] == 0.5
    assert found["first_shown_wins"]["mean"] == 0.75


def test_a_symmetric_judge_changes_no_margin_with_the_order() -> None:
    assert agreement(judged([1, -1], [1.5, -2.0]), SETTINGS, 0)["largest_order_difference"] == 0.0
    swayed = judged([1, -1], [1.5, float("nan")], [1.25, 1.0])
    assert agreement(swayed, SETTINGS, 0)["largest_order_difference"] == 0.25


def test_scores_of_both_orders_become_margins_of_the_first_answer() -> None:
    verdicts = Verdicts.from_scores([pair(1)], [7.0, 4.0, 5.0, 6.0])
    assert (verdicts.forward.tolist(), verdicts.backward.tolist(), verdicts.margins.tolist()) == ([3], [1], [2])


def test_length_is_a_baseline_and_a_bias() -> None:
    answers = [("long one", "x"), ("x", "long one"), ("long one", "x"), ("same", "size")]
    pairs = [pair(v, a, f"p{k}") for k, (v, a) in enumerate(zip([1, 1, 1, -1], answers, strict=True))]
    margins = np.array([1.0, -1.0, 1.0, 1.0])
    found = agreement(Verdicts(pairs, margins, margins), SETTINGS, 0)
    assert found["length_only_accuracy"]["mean"] == pytest.approx(2.5 / 4), "equal length is a coin"
    assert found["judge_prefers_longer"]["mean"] == 1.0
    assert found["people_prefer_longer"]["mean"] == pytest.approx(2 / 3)
    assert sum(one["pairs"] for one in found["by_length"]) == 4
    assert found["gain_over_length"]["mean"] == pytest.approx((2 - 2.5) / 4)
    # The rule is wrong if people prefer the shorter answer, and a coin flip at equal length.
    rule = {one["from_characters"]: one["length_only"] for one in found["by_length"]}
    assert rule[-7] == 0.0
    assert rule[7] == 1.0


def test_verdicts_that_could_not_be_had_are_left_out() -> None:
    found = agreement(judged([1, -1, 1], [1.0, float("nan"), -1.0]), SETTINGS, 0)
    assert (found["without_verdict"], found["decided_pairs"], found["accuracy"]["mean"]) == (1, 2, 0.5)


def test_a_pair_counts_only_if_both_orders_were_judged() -> None:
    nan = float("nan")
    found = agreement(judged([1, 1, -1, -1], [2.0, nan, -3.0, 1.0], [1.0, 1.0, nan, 2.0]), SETTINGS, 0)
    whole = agreement(judged([1, -1], [2.0, 1.0], [1.0, 2.0]), SETTINGS, 0)
    assert (found["without_verdict"], found["decided_pairs"]) == (2, 2)
    for name in ("accuracy", "kappa", "judge_ties", "same_in_both_orders", "first_shown_wins"):
        assert found[name]["mean"] == whole[name]["mean"]
    assert found["largest_order_difference"] == whole["largest_order_difference"] == 1.0


def test_sources_have_their_own_accuracy() -> None:
    pairs = [pair(1, source="hh"), pair(1, source="hh"), pair(-1, source="oasst")]
    margins = np.array([1.0, -1.0, -1.0])
    found = agreement(Verdicts(pairs, margins, margins), SETTINGS, 0)["by_source"]
    assert {name: (one["pairs"], one["mean"]) for name, one in found.items()} == {"hh": (2, 0.5), "oasst": (1, 1.0)}


def test_all_pairs_of_a_prompt_are_drawn_together() -> None:
    many = [pair(1, prompt="same") for _ in range(40)]
    margins = np.array([1.0, -1.0] * 20)
    found = agreement(Verdicts(many, margins, margins), SETTINGS, 0)
    assert found["accuracy"] == {"mean": 0.5, "low": 0.5, "high": 0.5}, "one prompt tells nothing of others"


def test_people_agree_with_each_other_over_all_pairs_of_raters() -> None:
    three = JudgedPair("x", (), ("a", "b"), 1, (1, 1, -1), "s")
    with_tie = JudgedPair("y", (), ("a", "b"), 1, (1, 0), "s")
    assert people_with_each_other([three, with_tie]) == {"doubles": 3, "agreement": pytest.approx(1 / 3)}
    assert people_with_each_other([with_tie]) is None
