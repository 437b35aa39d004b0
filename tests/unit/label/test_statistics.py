"""Reward statistics: values, and every numeric edge case that a reward model can produce."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offline_align.errors import DataError, StorageError
from offline_align.label.figures import draw_reward_histogram
from offline_align.label.statistics import (
    LEVELS,
    RewardStats,
    Scale,
    fit,
    normalise,
    same_scale,
    scale_of,
    share_within,
)


def test_mean_std_count_and_quantiles() -> None:
    stats = fit([1.0, 2.0, 3.0, 4.0])
    assert stats.mean == 2.5
    assert stats.std == pytest.approx(np.sqrt(1.25), abs=1e-15)
    assert stats.count == 4
    assert stats.quantiles["0"] == 1.0
    assert stats.quantiles["0.5"] == 2.5
    assert stats.quantiles["1"] == 4.0
    assert len(stats.quantiles) == len(LEVELS)


def test_normalised_rewards_have_mean_zero_and_std_one() -> None:
    raw = np.random.default_rng(0).normal(7.0, 9.0, 5000)
    reward = normalise(raw, fit(raw))
    assert reward.mean() == pytest.approx(0.0, abs=1e-12)
    assert reward.std() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_array_equal(np.argsort(reward), np.argsort(raw))


def test_scaling_changes_no_bit() -> None:
    raw = np.random.default_rng(1).normal(7.0, 9.0, 999)
    stats = fit(raw)
    assert stats.mean == raw.mean()
    assert stats.std == pytest.approx(raw.std(), rel=1e-15)


def test_float32_rewards_are_summed_in_float64() -> None:
    raw = np.full(100_000, 0.1, dtype=np.float32)
    raw[0] = 0.2
    assert fit(raw).mean == pytest.approx(float(raw.astype(np.float64).mean()), rel=1e-14)


@pytest.mark.parametrize("raw", [[0.1, 0.1, 0.1], [3.7], [0.0, 0.0], [-1e300, -1e300]])
def test_constant_rewards_become_zero_with_a_warning(raw: list[float], caplog: pytest.LogCaptureFixture) -> None:
    stats = fit(raw)
    assert (stats.mean, stats.std) == (raw[0], 0.0)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(normalise(raw, stats), np.zeros(len(raw)))
    assert "no method can tell rows apart" in caplog.text


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_rewards_name_the_row(bad: float) -> None:
    with pytest.raises(DataError, match=r"row 2: reward_raw: -?(nan|inf) is not finite \(1 such rows\)"):
        fit([0.0, 1.0, bad, 2.0])
    with pytest.raises(DataError, match="row 1"):
        normalise([0.0, bad], fit([0.0, 1.0]))


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="no rows"):
        fit([])


def test_an_outlier_stays_finite_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    raw = np.concatenate([np.linspace(-1, 1, 999), [1e30]])
    with caplog.at_level(logging.WARNING):
        reward = normalise(raw, fit(raw))
    assert reward[-1] == pytest.approx(np.sqrt(999))
    np.testing.assert_allclose(reward[:-1], -1 / np.sqrt(999))
    assert "row 999" in caplog.text


def test_the_largest_floats_do_not_overflow() -> None:
    raw = np.array([1.7e308, -1.7e308, 1.7e308, -1.7e308])
    stats = fit(raw)
    assert stats.std == pytest.approx(1.7e308)
    assert all(np.isfinite(value) for value in stats.quantiles.values())
    np.testing.assert_allclose(normalise(raw, stats), [1, -1, 1, -1])


def test_the_smallest_floats_do_not_divide_by_zero() -> None:
    assert np.isfinite(normalise([0.0, 5e-324], fit([0.0, 5e-324]))).all()


def test_json_round_trip_has_the_published_keys() -> None:
    stats = fit([1.0, -2.0, 0.5])
    text = json.dumps(stats.as_json())
    assert list(json.loads(text)) == ["mean", "std", "count", "quantiles"]
    assert RewardStats.from_json(json.loads(text)) == stats


def test_a_given_scale_normalises_and_the_own_statistics_stay() -> None:
    stats = replace(fit([4.0, 8.0]), normalised_with=Scale(2.0, 4.0))
    np.testing.assert_array_equal(normalise([4.0, 8.0], stats), [0.5, 1.5])
    written = json.loads(json.dumps(stats.as_json()))
    assert (written["mean"], written["std"], written["normalised_with"]) == (6.0, 2.0, {"mean": 2.0, "std": 4.0})
    assert RewardStats.from_json(written) == stats


def test_equal_rewards_have_a_value_on_a_given_scale(caplog: pytest.LogCaptureFixture) -> None:
    stats = replace(fit([6.0, 6.0]), normalised_with=Scale(2.0, 4.0))
    np.testing.assert_array_equal(normalise([6.0, 6.0], stats), [1.0, 1.0])
    assert not caplog.messages


def test_the_scale_of_rows_is_found_from_their_rewards() -> None:
    raw = np.random.default_rng(0).normal(3.0, 2.0, size=50)
    stats = fit(raw)
    found = scale_of(raw, normalise(raw, stats))
    assert found is not None
    assert [found.mean, found.std] == pytest.approx([stats.mean, stats.std])
    assert same_scale(found, stats.scale)
    assert not same_scale(Scale(stats.mean + 0.01 * stats.std, stats.std), stats.scale)
    assert not same_scale(Scale(stats.mean, 1.01 * stats.std), stats.scale)


@pytest.mark.parametrize("normalised", [[0.0, 0.0, 0.0], [0.0, 1.0, 4.0], [2.0, 1.0, 0.0]])
def test_rewards_that_no_scale_explains_have_none(normalised: list[float]) -> None:
    assert scale_of([0.0, 1.0, 2.0], normalised) is None


def test_share_within() -> None:
    assert share_within([-3.0, -2.5, 0.0, 2.4], 2.5) == 0.75


@pytest.mark.parametrize("raw", [[1.0], [2.0] * 50, [*np.linspace(-3, 3, 4000), 1e30], [3e38, -3e38, 0.0]])
def test_the_histogram_is_drawn_for_every_edge(tmp_path: Path, raw: list[float]) -> None:
    target = draw_reward_histogram(tmp_path / "reward_histogram.png", raw, normalise(raw, fit(raw)), bins=60)
    assert target.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["reward_histogram.png"]


def test_the_histogram_reports_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"reward_histogram\.png"):
        draw_reward_histogram(tmp_path / "absent" / "reward_histogram.png", [0.0, 1.0], [-1.0, 1.0], bins=5)
