"""Agreement between several raters."""

from collections.abc import Sequence

import numpy as np


def krippendorff_alpha(ratings: Sequence[Sequence[float]]) -> float | None:
    """Return Krippendorff's alpha on the interval scale from the ratings of each answer.

    Alpha is 1 for full agreement, 0 for chance, and negative for worse than chance. Raters may skip
    answers. Returns None if no answer has two ratings or all ratings are equal.
    """
    shared = [np.asarray(one, dtype=np.float64) for one in ratings if len(one) > 1]
    if not shared:
        return None
    # The squared differences over all ordered pairs of n values sum to 2 n^2 times the variance.
    observed = sum(2 * one.size**2 * one.var() / (one.size - 1) for one in shared)
    pooled = np.concatenate(shared)
    expected = 2 * pooled.size**2 * pooled.var() / (pooled.size - 1)
    return float(1 - observed / expected) if expected > 0 else None
