"""Krippendorff's alpha against its definition and its published example."""

from itertools import permutations

import pytest

from offline_align.evaluate.judges.rater_agreement import krippendorff_alpha


def by_definition(units: list[list[float]]) -> float:
    """Return alpha from sums over ordered pairs, as in the definition."""
    shared = [one for one in units if len(one) > 1]
    values = [value for one in shared for value in one]
    observed = sum(sum((a - b) ** 2 for a, b in permutations(one, 2)) / (len(one) - 1) for one in shared) / len(values)
    expected = sum((a - b) ** 2 for a, b in permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


def test_the_published_example() -> None:
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", data of section C: 0.849 on the interval scale.
    raters = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[float(v) for v in unit if v is not None] for unit in zip(*raters, strict=True)]
    found = krippendorff_alpha(units)
    assert found == pytest.approx(0.849, abs=5e-4)
    assert found == pytest.approx(by_definition(units))


def test_full_agreement_is_one_and_opposition_is_negative() -> None:
    assert krippendorff_alpha([[1, 1], [5, 5], [9, 9]]) == 1.0
    assert krippendorff_alpha([[1, 10], [10, 1]]) == pytest.approx(by_definition([[1, 10], [10, 1]]))
    assert (krippendorff_alpha([[1, 10], [10, 1]]) or 0) < 0


def test_one_rater_tells_nothing() -> None:
    assert krippendorff_alpha([[1.0], [2.0]]) is None
    assert krippendorff_alpha([[3.0, 3.0], [3.0, 3.0]]) is None
