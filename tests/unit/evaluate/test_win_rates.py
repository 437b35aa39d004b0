"""Bootstrap intervals, win rates and rank scores, against plain definitions."""

import numpy as np
import pytest

from offline_align.evaluate import statistics
from offline_align.evaluate.resampling import mean_estimates
from offline_align.evaluate.statistics import distinct_n, rank_scores, wins


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
    monkeypatch.setattr(statistics, "_CHUNK", 30 * 7)
    for one, other in zip(mean_estimates(values, 200, 0.95, seed=7), whole, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_one_prompt_has_a_point_as_interval() -> None:
    (estimate,) = mean_estimates(np.array([[2.5]]), 10, 0.95, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (2.5, 2.5, 2.5)


def test_ties_are_half_a_win() -> None:
    table = wins(np.array([[1.0, 2.0, 2.0]]))[0]
    np.testing.assert_array_equal(table, [[0.5, 0, 0], [1, 0.5, 0.5], [1, 0.5, 0.5]])


def test_rank_score_of_five_methods_is_six_minus_rank() -> None:
    scores = np.array([[0.1, 0.5, 0.2, 0.9, 0.4]])
    rank = 1 + np.argsort(np.argsort(-scores, axis=1), axis=1)
    np.testing.assert_array_equal(rank_scores(scores), 6 - rank)


def test_tied_methods_share_the_mean_rank() -> None:
    np.testing.assert_array_equal(rank_scores(np.array([[3.0, 1.0, 3.0, 0.0]])), [[3.5, 2.0, 3.5, 1.0]])


def test_rank_scores_of_a_prompt_always_have_the_same_sum() -> None:
    scores = np.random.default_rng(0).integers(0, 4, (200, 5)).astype(float)
    np.testing.assert_array_equal(rank_scores(scores).sum(axis=1), np.full(200, 15.0))


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [(["a b a b"], 1, 0.5), (["a b a b"], 2, 2 / 3), (["a", "A"], 1, 0.5), (["a"], 2, 0.0), ([""], 1, 0.0)],
)
def test_distinct_n(texts: list[str], n: int, share: float) -> None:
    assert distinct_n(texts, n) == pytest.approx(share)
