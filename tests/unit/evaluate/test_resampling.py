"""Bootstrap over clusters: means, totals, intervals, and undefined statistics."""

import math

import numpy as np
import pytest

from offline_align.evaluate import resampling
from offline_align.evaluate.resampling import cluster_sums, estimate, kappa, mean_estimates, ratio


def test_rows_of_a_cluster_are_added() -> None:
    sums = cluster_sums(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), ["p", "q", "p"])
    assert sums.tolist() == [[2.0, 2.0], [0.0, 1.0]]


def test_the_interval_covers_a_share_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        hits = (rng.random(100) < 0.7).astype(float)
        found = estimate(np.stack([hits, np.ones(100)], axis=1), ratio, 300, 0.9, trial)
        covered += found.low <= 0.7 <= found.high
    assert 165 <= covered <= 195


def test_a_share_of_nothing_has_no_value() -> None:
    assert math.isnan(estimate(np.zeros((3, 2)), ratio, 50, 0.95, 0).mean)


def test_kappa_of_perfect_and_of_chance_agreement() -> None:
    assert kappa(np.array([5.0, 0.0, 0.0, 5.0])) == 1.0
    assert kappa(np.array([1.0, 1.0, 1.0, 1.0])) == 0.0


def test_an_interval_holds_the_mean_and_has_the_right_width() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 1))
    (estimate,) = mean_estimates(values, 4000, 0.95, seed=1)
    assert estimate.mean == pytest.approx(values.mean())
    standard_error = values.std() / np.sqrt(400)
    assert estimate.mean - estimate.low == pytest.approx(1.96 * standard_error, rel=0.08)
    assert estimate.high - estimate.mean == pytest.approx(1.96 * standard_error, rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for k in range(300):
        (estimate,) = mean_estimates(rng.normal(0.0, 1.0, (80, 1)), 400, 0.9, seed=k)
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.84 <= covered / 300 <= 0.95


def test_resampling_is_paired() -> None:
    values = np.random.default_rng(0).normal(0.0, 5.0, (50, 1))
    shifted = np.hstack([values, values + 1.0, values - (values + 1.0)])
    a, b, difference = mean_estimates(shifted, 500, 0.95, seed=0)
    assert b.low - a.low == pytest.approx(1.0)
    assert (difference.low, difference.high) == pytest.approx((-1.0, -1.0))


def test_seeds_repeat_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    whole = mean_estimates(values, 200, 0.95, seed=7)
    assert mean_estimates(values, 200, 0.95, seed=7) == whole
    assert mean_estimates(values, 200, 0.95, seed=8) != whole
    monkeypatch.setattr(resampling, "_CHUNK", 30 * 7)
    for one, other in zip(mean_estimates(values, 200, 0.95, seed=7), whole, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_one_prompt_has_a_point_as_interval() -> None:
    (estimate,) = mean_estimates(np.array([[2.5]]), 10, 0.95, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (2.5, 2.5, 2.5)
