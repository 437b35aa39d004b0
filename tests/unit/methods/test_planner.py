"""The planner: figures checked by hand, and agreement with the methods."""

import math
import random
from dataclasses import replace

import pytest

from offline_align.config.runs import PlanMethodSection
from offline_align.config.sections import ConditionKind, PairsOf
from offline_align.data.records import LabelledSample, Message
from offline_align.errors import ConfigError, DataError
from offline_align.methods import ca, fa, rwr
from offline_align.methods.planner import Sizes, filtering, plan, weighted

SETTINGS = PlanMethodSection()


def labelled(*rewards: float) -> list[LabelledSample]:
    prompt = (Message("user", "Hello"),)
    return [LabelledSample(f"row-{i}", prompt, "Fine", {}, r, r, "s") for i, r in enumerate(rewards)]


def sizes(*rows: int) -> Sizes:
    return Sizes("tokens", rows, [row // 2 for row in rows], lambda text: len(text) - len("<rm_score>"))


def test_figures_by_hand() -> None:
    made = plan(labelled(-1.0, 0.0, 1.0, 2.0), sizes(10, 20, 30, 40), SETTINGS, seed=1)
    assert (made.rows, made.unit, made.size, made.response_size) == (4, "tokens", 100, 50)
    assert (made.filtering.rows, made.filtering.rows_share, made.filtering.size) == (2, 0.5, 70)
    assert made.filtering.cost == pytest.approx(0.7)
    assert made.weighted.max_weight / made.weighted.min_weight == pytest.approx(math.exp(3 / 5))
    assert made.conditional.conditions == {
        "<rm_score>-1.0": 1,
        "<rm_score>0.0": 1,
        "<rm_score>1.0": 1,
        "<rm_score>2.0": 1,
    }
    assert made.conditional.extra_size == 4 + 3 * 3
    assert made.conditional.cost == pytest.approx(1.13)
    assert [row.beta for row in made.betas] == [0.5, 1.0, 2.0, 5.0, 10.0]


def test_repeated_prompts() -> None:
    rows = labelled(-1.0, 0.0, 1.0, 2.0, 3.0)
    other = (Message("user", "Bye"),)
    rows = [replace(row, prompt=other) if number in (1, 4) else row for number, row in enumerate(rows)]
    made = plan(rows, sizes(10, 20, 30, 40, 60), SETTINGS, seed=1)
    # Half of each row is its prompt. The third and fourth rows repeat the first prompt, the fifth the second.
    assert made.repeated == 15 + 20 + 30
    # FA keeps the last three rows, of which the fourth repeats the prompt of the third.
    assert (made.filtering.rows, made.filtering.repeated) == (3, 20)


def test_pairs_by_hand() -> None:
    rows = labelled(-1.0, 0.5, 1.0, 2.0, 3.0)
    other = (Message("user", "Bye"),)
    rows = [replace(row, prompt=other, response=f"{number}") if number < 2 else row for number, row in enumerate(rows)]
    rows = [replace(row, response=f"{number}") for number, row in enumerate(rows)]
    pairs = plan(rows, sizes(10, 20, 30, 40, 60), SETTINGS, seed=1).preference
    # Half of each row is its prompt: 10 + 10 / 2 for row 1 against 0, and 30 + 30 / 2 for row 4 against 2.
    assert (pairs.pairs, pairs.prompts, pairs.single_answers) == (2, 2, 0)
    assert (pairs.min_gap, pairs.mean_gap, pairs.max_gap) == (1.5, 1.75, 2.0)
    assert (pairs.mean_chosen, pairs.mean_rejected) == (20.0, 10.0)
    assert pairs.size == (10 + 10 + 5) + (30 + 30 + 15)
    assert pairs.cost == pytest.approx(4 / 3 * 100 / 160)
    every = plan(rows, sizes(10, 20, 30, 40, 60), replace(SETTINGS, pairs=PairsOf.all, min_gap=1.5), seed=1).preference
    assert (every.pairs, every.max_gap) == (2, 2.0)
    alone = plan(rows[:1], sizes(10), SETTINGS, seed=1).preference
    assert (alone.pairs, alone.single_answers, alone.size) == (0, 1, 0)


def test_the_plan_agrees_with_the_methods() -> None:
    source = random.Random(1)
    rows = labelled(*(source.gauss(0, 1.5) for _ in range(500)))
    settings = PlanMethodSection(threshold=0.4, beta=0.8, target_reward=2.0, reward_limit=2.5)
    made = plan(rows, sizes(*(source.randint(5, 50) for _ in rows)), settings, seed=1)
    assert made.filtering.rows == len(fa.keep(rows, 0.4))
    weights = [row.weight for row in rwr.weigh(rows, 0.8)]
    assert (made.weighted.min_weight, made.weighted.max_weight) == (min(weights), max(weights))
    assert made.weighted.effective_sample_size == pytest.approx(rwr.effective_sample_size(weights))
    assert made.weighted.effective_share == pytest.approx(rwr.effective_sample_size(weights) / 500)
    assert made.weighted.top_mass == pytest.approx(sum(sorted(weights)[-5:]) / 500)
    written = [row.condition for row in ca.condition(rows, ca.fit(rows, settings, 1))]
    assert made.conditional.conditions == {text: written.count(text) for text in set(written)}
    values = [float(text.removeprefix("<rm_score>")) for text in made.conditional.conditions]
    assert values == sorted(values)
    assert made.conditional.clipped_rows == sum(abs(row.reward) > 2.5 for row in rows)
    assert made.conditional.target_rows == written.count("<rm_score>2.0")


@pytest.mark.parametrize(
    ("target", "percentile", "in_range"),
    [(5.0, 100.0, False), (0.0, 50.0, True), (-2.0, 0.0, False), (2.0, 100.0, True)],
)
def test_where_the_target_lies(target: float, percentile: float, in_range: bool) -> None:
    settings = PlanMethodSection(target_reward=target)
    made = plan(labelled(2.0, -1.0, 0.0, 1.0), sizes(1, 1, 1, 1), settings, seed=1).conditional
    assert (made.target_percentile, made.target_in_range) == (percentile, in_range)


def test_quantiles_by_hand() -> None:
    settings = PlanMethodSection(condition=ConditionKind.quantile, quantiles=2, target_reward=2.0)
    made = plan(labelled(2.0, -1.0, 0.0, 1.0, 12.0), sizes(10, 20, 30, 40, 50), settings, seed=1).conditional
    assert made.cut_points == (1.0,)
    assert made.conditions == {"<rm_score>1": 3, "<rm_score>2": 2}
    assert (made.target_condition, made.target_rows, made.target_percentile) == ("<rm_score>2", 2, 100.0)
    assert (made.target_in_range, made.clipped_rows, made.rows, made.weights) == (True, 0, 5, None)
    assert made.extra_size == 5


def test_bounds_and_weights_by_hand() -> None:
    settings = PlanMethodSection(condition=ConditionKind.at_least, bounds=2, target_reward=2.0, weight_by_reward=True)
    rows = labelled(-1.0, 0.0, 1.0, 2.0)
    made = plan(rows, sizes(10, 20, 30, 40), settings, seed=3)
    written = [row.condition for row in ca.condition(rows, ca.fit(rows, settings, 3))]
    assert made.conditional.conditions == {text: written.count(text) for text in made.conditional.conditions}
    assert next(iter(made.conditional.conditions)) == "<rm_score>-1.0"
    assert made.conditional.rows == 8
    # A second copy of every row, and the texts: 4 for -1.0, 3 for others.
    below = written.count("<rm_score>-1.0")
    assert made.conditional.extra_size == 100 + 4 * below + 3 * (8 - below)
    assert made.conditional.repeated == 2 * made.repeated + 5
    assert made.conditional.weights == made.weighted
    assert made.conditional.target_in_range == ("<rm_score>2.0" in written)


def test_a_threshold_that_keeps_no_rows_can_be_planned() -> None:
    made = filtering(labelled(-1.0, 0.0), sizes(5, 5), 0.0)
    assert (made.rows, made.size, made.cost) == (0, 0, 0.0)


def test_a_low_temperature_leaves_one_row() -> None:
    made = weighted([0.0, 1.0, 2.0], 1e-6)
    assert made.effective_sample_size == pytest.approx(1.0)
    assert made.top_mass == pytest.approx(1.0)
    assert made.max_weight == pytest.approx(3.0)


def test_unusable_rows_and_settings_are_refused() -> None:
    with pytest.raises(DataError, match=r"no usable row"):
        plan([], sizes(), SETTINGS, seed=1)
    with pytest.raises(DataError, match=r"finite"):
        plan(labelled(math.nan), sizes(1), SETTINGS, seed=1)
    with pytest.raises(ConfigError, match=r"method.beta"):
        plan(labelled(1.0), sizes(1), PlanMethodSection(beta=0.0), seed=1)
