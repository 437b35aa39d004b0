"""The certificate's arithmetic."""

import pytest

from offline_align.label.certificate import certify, choose_rows, in_words
from offline_align.label.statistics import fit


def test_rows_are_a_fixed_random_part() -> None:
    rows = choose_rows(1000, 0.005, 7)
    assert len(rows) == 5
    assert rows == sorted(set(rows)) == choose_rows(1000, 0.005, 7)
    assert rows != choose_rows(1000, 0.005, 8)
    assert (len(choose_rows(3, 0.005, 7)), choose_rows(3, 0.0, 7), choose_rows(3, 1.0, 7)) == (1, [], [0, 1, 2])


def test_equal_scores_give_a_clean_certificate() -> None:
    scores = [0.0, 1.0, 2.0, 5.0]
    found = certify(scores, scores, fit(scores))
    assert (found["largest_difference"], found["rank_flips"], found["sign_flips"]) == (0.0, 0, 0)
    assert (found["pairs"], found["equal_rows"]) == (6, 4)


def test_rank_flips_and_sign_flips_are_counted() -> None:
    first = [0.0, 1.9, 2.1, 4.0]  # the mean, which is the threshold, is 2
    found = certify(first, [0.0, 2.2, 2.1, 4.0], fit(first))
    assert found["largest_difference"] == pytest.approx(0.3)
    assert found["largest_normalised_difference"] == pytest.approx(0.3 / fit(first).std)
    assert (found["rank_flips"], found["sign_flips"], found["equal_rows"]) == (1, 1, 3)
    assert "1 of 6 pairs changed order" in in_words(found)
