"""Conditions of Conditional Alignment: quantiles, bounds and weights, checked by hand."""

import json
import math
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import ConditionalMethodSection, ConditionKind, Template
from offline_align.data.condition import AtLeastCondition, Condition, QuantileCondition, ValueCondition
from offline_align.data.records import LabelledSample, Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError, DataError
from offline_align.methods import ca, rwr
from offline_align.methods.conditions import Bounds, cut_points
from tests.small_tokenizers import write_sentencepiece

QUANTILE = ConditionalMethodSection(condition=ConditionKind.quantile)
AT_LEAST = ConditionalMethodSection(condition=ConditionKind.at_least, target_reward=1.0)


def labelled(*rewards: float, name: str = "row") -> list[LabelledSample]:
    prompt = (Message("user", "Hello"),)
    return [LabelledSample(f"{name}-{i}", prompt, "Fine", {}, 10 * r, r, "s") for i, r in enumerate(rewards)]


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    return Renderer(load_tokenizer(write_sentencepiece(tmp_path)), Template.paper)


# ---- Quantiles


@pytest.mark.parametrize(
    ("rewards", "quantiles", "cuts"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, [2.0, 4.0]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 2, [3.0]),  # three rows below, two above
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 3, [3.0, 5.0]),
        ([1.0, 2.0], 5, [1.0]),  # fewer rows than quantiles
        ([1.0, 1.0, 1.0, 2.0], 2, [1.0]),  # ties lie in one quantile
        ([1.0, 2.0, 2.0, 2.0], 2, [1.0]),  # the cut point moves below a tie at the top
        ([1.0, 3.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0], 5, [3.0, 4.0]),
        ([2.0, 2.0, 2.0], 4, []),
    ],
)
def test_cut_points_by_hand(rewards: list[float], quantiles: int, cuts: list[float]) -> None:
    assert cut_points(rewards, quantiles) == cuts


def test_a_row_states_the_number_of_its_quantile() -> None:
    rows = labelled(3.0, -1.0, 0.5, 2.0, 0.5, 1.0)
    settings = replace(QUANTILE, quantiles=3)
    fitted = ca.fit(rows, settings, 1)
    # In order: -1, 0.5, 0.5 | 1, 2 | 3. The first cut point is 0.5, and its tie stays below.
    assert fitted.condition == QuantileCondition("<rm_score>{quantile}", (0.5, 1.0), (0.0, 1.0, 2.5), 3)
    texts = [row.condition.removeprefix("<rm_score>") for row in ca.condition(rows, fitted)]
    assert texts == ["3", "1", "1", "3", "1", "2"]
    assert fitted.condition.text == "<rm_score>3"


def test_every_quantile_has_rows_and_its_mean() -> None:
    rewards = [round(math.sin(i) * 3, 1) for i in range(200)]
    fitted = ca.fit(labelled(*rewards), replace(QUANTILE, quantiles=8), 1)
    assert isinstance(fitted.condition, QuantileCondition)
    numbers = [fitted.condition.number_of(reward) for reward in rewards]
    count = Counter(numbers)
    assert sorted(count) == list(range(1, 9))
    assert max(count.values()) - min(count.values()) < 20
    for number, mean in enumerate(fitted.condition.mean_rewards, start=1):
        own = [reward for reward, n in zip(rewards, numbers, strict=True) if n == number]
        assert mean == pytest.approx(sum(own) / len(own))
    assert all(low < high for low, high in pairwise(fitted.condition.mean_rewards))


def test_equal_rewards_make_fewer_quantiles(caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled(1.0, 3.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    fitted = ca.fit(rows, QUANTILE, 1)
    assert fitted.condition.target == 3
    assert "method.quantiles=5: many rewards are equal, so there are only 3" in caplog.text
    with pytest.raises(
        ConfigError, match=r"method.target_reward=4: .* from 1 .* to 3 .*method.quantiles=5 gives only 3"
    ):
        ca.fit(rows, replace(QUANTILE, target_reward=4.0), 1)
    assert ca.fit(rows, replace(QUANTILE, target_reward=2.0), 1).condition.target == 2


def test_rows_that_are_trained_on_are_counted_by_quantile(renderer: Renderer) -> None:
    rows = labelled(1.0, 2.0, 3.0, 4.0)
    made = ca.training_rows(rows, ca.fit(rows, replace(QUANTILE, quantiles=2), 1), renderer)
    assert made.finalize([0, 2, 3]).facts == {"reward_min": 1.0, "reward_max": 4.0, "quantile_rows": [1, 2]}


def test_numbers_of_two_digits_need_a_format_of_two_digits(renderer: Renderer) -> None:
    rows = labelled(*range(30))
    settings = replace(QUANTILE, quantiles=10)
    with pytest.raises(ConfigError, match=r"method.quantile_format=.*'<rm_score>10' takes .*\{quantile:02d\}"):
        ca.training_rows(rows, ca.fit(rows, settings, 1), renderer)
    settings = replace(settings, quantile_format="<rm_score>{quantile:02d}")
    made = ca.training_rows(rows, ca.fit(rows, settings, 1), renderer)
    assert (made.rows[0].condition, made.rows[-1].condition) == ("<rm_score>01", "<rm_score>10")


# ---- Bounds


def test_a_bound_is_a_training_reward_that_the_row_reaches() -> None:
    rewards = [math.sin(i) for i in range(300)]
    rows = labelled(*rewards)
    bounds = ca.fit(rows, AT_LEAST, 7).bounds
    assert bounds is not None
    drawn = [bounds.of(row) for row in rows]
    assert all(bound in rewards and bound <= row.reward for row, (bound,) in zip(rows, drawn, strict=True))
    # Uniform over the training rewards that a row reaches: the mean place is the middle.
    ordered = sorted(rewards)
    places = [(ordered.index(b) + 0.5) / (ordered.index(r) + 1) for (b,), r in zip(drawn, rewards, strict=True)]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.06)
    assert min(places) < 0.05
    assert max(places) > 0.95


def test_draws_depend_on_seed_and_id_alone() -> None:
    rows = labelled(*(math.sin(i) for i in range(50)))
    one, again, other = (ca.fit(some, AT_LEAST, seed) for some, seed in ((rows, 1), (rows[::-1], 1), (rows, 2)))
    drawn = {row.sample.id: row.condition for row in ca.condition(rows, one)}
    assert {row.sample.id: row.condition for row in ca.condition(rows[::-1], again)} == drawn
    assert {row.sample.id: row.condition for row in ca.condition(rows, other)} != drawn
    # The first row of another run keeps this value, so that a run that continues reads the same rows.
    assert Bounds(range(10**6), 1, 1).of(labelled(1e7)[0]) == [34439]


def test_several_bounds_of_a_row_come_from_equal_parts() -> None:
    rewards = [float(i) for i in range(40)]
    row = labelled(19.5)[0]
    for seed in range(5):
        drawn = Bounds(rewards, 4, seed).of(row)
        # The row reaches 0 to 19, and each quarter has five of them.
        assert [int(bound // 5) for bound in drawn] == [0, 1, 2, 3]
    assert Bounds(rewards, 3, 1).of(labelled(-1.0)[0]) == [-1.0] * 3


def test_copies_of_a_row_stand_side_by_side(renderer: Renderer) -> None:
    rows = labelled(-1.0, 0.0, 1.0, 2.0)
    settings = replace(AT_LEAST, bounds=2, weight_by_reward=True, beta=1.0)
    made = ca.training_rows(rows, ca.fit(rows, settings, 1), renderer)
    assert [row.sample.id for row in made.rows] == [f"row-{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    final = made.finalize(range(8))
    assert final.weights is not None
    assert sum(final.weights) == pytest.approx(8.0)
    assert final.weights[2] / final.weights[0] == pytest.approx(math.e)
    assert (final.facts["bound_min"], final.facts["reward_max"]) == (-1.0, 2.0)


def test_a_bound_that_no_row_states_is_a_warning(renderer: Renderer, caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled(*(i / 10 for i in range(10)))
    made = ca.training_rows(rows, ca.fit(rows, AT_LEAST, 1), renderer)
    made.finalize(range(10))
    assert "method.target_reward=1: bounds of the rows range from 0.00" in caplog.text


# ---- Weights, and validation rows


def test_weights_are_those_of_rwr(renderer: Renderer) -> None:
    rows = labelled(-2.0, -0.5, 0.0, 1.0, 2.5)
    settings = ConditionalMethodSection(weight_by_reward=True, beta=0.7, target_reward=1.0)
    made = ca.training_rows(rows, ca.fit(rows, settings, 1), renderer)
    final = made.finalize([0, 1, 3])
    assert final.weights == rwr.scaled_weights([-2.0, -0.5, 1.0], 0.7)
    assert final.facts["weight_max"] == max(final.weights)
    assert [row.condition for row in made.rows] == [f"<rm_score>{row.reward:.1f}" for row in rows]
    plain = ca.training_rows(rows, ca.fit(rows, replace(settings, weight_by_reward=False), 1), renderer)
    assert plain.finalize([0, 1, 3]).weights is None


def test_validation_rows_use_what_the_training_rows_determine(renderer: Renderer) -> None:
    rows, held_out = labelled(0.0, 1.0, 2.0, 3.0), labelled(2.5, 10.0, -5.0, name="valid")
    settings = replace(QUANTILE, quantiles=2, weight_by_reward=True, beta=1.0)
    final = ca.training_rows(rows, ca.fit(rows, settings, 1), renderer).finalize([0, 1, 2, 3])
    valid = ca.training_rows(held_out, final.fitted, renderer)
    # The cut point of the training rows is 1. That of these rows alone would be 2.5.
    assert [row.condition for row in valid.rows] == ["<rm_score>2", "<rm_score>2", "<rm_score>1"]
    weights = valid.finalize([0, 1, 2]).weights
    assert weights is not None
    assert final.weights is not None
    # Rewards beyond those of training weigh as much as the highest one of training.
    assert weights[1] == final.weights[3]
    assert weights[0] == pytest.approx(final.weights[2] * math.exp(0.5))
    assert weights[2] == pytest.approx(final.weights[0] * math.exp(-5.0))


def test_bounds_of_validation_rows_are_training_rewards(renderer: Renderer) -> None:
    rows, held_out = labelled(*(i / 7 for i in range(7))), labelled(0.5, 0.9, -3.0, name="valid")
    final = ca.training_rows(rows, ca.fit(rows, AT_LEAST, 1), renderer).finalize(range(7))
    drawn = [final.fitted.bounds.of(row)[0] for row in held_out]
    assert {drawn[0], drawn[1]} <= {row.reward for row in rows}
    assert drawn[2] == -3.0


def test_a_condition_of_validation_rows_gives_no_second_warning(
    renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = labelled(0.0, 1.0)
    final = ca.training_rows(rows, ca.fit(rows, ConditionalMethodSection(), 1), renderer).finalize([0, 1])
    assert caplog.text.count("extrapolate") == 1
    ca.training_rows(rows, final.fitted, renderer).finalize([0, 1])
    assert caplog.text.count("extrapolate") == 1


@pytest.mark.parametrize("settings", [QUANTILE, AT_LEAST, ConditionalMethodSection(weight_by_reward=True)])
def test_unusable_rewards_are_bad_data(settings: ConditionalMethodSection) -> None:
    with pytest.raises(DataError, match=r"row row-1: reward: nan is not a finite number"):
        ca.fit(labelled(1.0, math.nan), settings, 1)
    with pytest.raises(DataError, match=r"no usable row"):
        ca.fit([], settings, 1)


# ---- Stored conditions


STORED: list[Condition] = [
    ValueCondition("<rm_score>{reward:.1f}", 9.9, 5.0),
    AtLeastCondition("<rm_score>{reward:.1f}", 9.9, 2.0),
    QuantileCondition("<rm_score>{quantile}", (-0.5, 0.5), (-1.0, 0.0, 1.0), 3),
]


@pytest.mark.parametrize("condition", STORED)
def test_a_condition_is_read_as_it_was_stored(condition: Condition) -> None:
    assert Condition.from_values(json.loads(json.dumps(asdict(condition)))) == condition


def test_a_value_is_stored_as_by_earlier_versions() -> None:
    expected = {"reward_format": "<rm_score>{reward:.1f}", "reward_limit": 9.9, "target_reward": 5.0}
    assert json.dumps(asdict(STORED[0])) == json.dumps(expected)
    assert Condition.from_values(None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"cut_points": [0.5, -0.5]},
        {"cut_points": [0.5]},
        {"mean_rewards": [0.0, 1.0, math.inf]},
        {"target_quantile": 4},
        {"target_quantile": "3"},
        {"quantile_format": "<rm_score>"},
        {"kind": "other"},
    ],
)
def test_damaged_conditions_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        Condition.from_values(asdict(STORED[2]) | change)


@pytest.mark.parametrize("target", [0.0, 4.0, 1.5, -1.0, math.nan, math.inf])
def test_only_numbers_of_quantiles_can_be_asked_for(target: float) -> None:
    with pytest.raises(ConfigError, match=r"method.target_reward=.*3 quantiles.*from 1 \(lowest rewards\) to 3"):
        STORED[2].asking(target)
    assert STORED[2].asking(1.0).text == "<rm_score>1"
    assert STORED[2].reward_of(1) == -1.0


def test_bounds_and_rewards_can_be_asked_for_within_the_limit() -> None:
    for condition in STORED[:2]:
        assert condition.asking(-9.9).text == "<rm_score>-9.9"
        assert type(condition.asking(1.0)) is type(condition)
        with pytest.raises(ConfigError, match=r"method.target_reward=10.0: .* plus or minus 9.9"):
            condition.asking(10.0)


def test_the_card_says_what_a_text_means() -> None:
    assert [condition.meaning.split(":")[0] for condition in STORED] == [
        "The response is conditioned on the reward",
        "The response is conditioned on a bound that its reward reaches",
        "The response is conditioned on the quantile of its reward",
    ]
    assert "`<rm_score>3`. Write another number there, from 1 (lowest rewards) to 3 (highest)" in STORED[2].meaning
