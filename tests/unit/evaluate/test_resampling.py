"""Cluster bootstrap: totals, intervals, and statistics without a value."""

import math

import numpy as np

from offline_align.evaluate.resampling import cluster_sums, estimate, kappa, ratio


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
