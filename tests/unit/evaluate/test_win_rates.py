"""Win rates, rank scores and distinct n-grams against their definitions."""

import numpy as np
import pytest

from offline_align.evaluate.statistics import distinct_n, rank_scores, wins


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
