"""How far several people agree in their ratings."""

from collections.abc import Sequence

import numpy as np


def krippendorff_alpha(ratings: Sequence[Sequence[float]]) -> float | None:
    """Return Krippendorff's alpha with squared differences (interval scale) of the ratings of each answer.

    1 where raters agree in full, 0 for chance, negative where they disagree by more than that; raters may leave out
    answers. None where no answer has two ratings, or all ratings are equal, so that nothing can be told.
    """
    shared = [np.asarray(one, dtype=np.float64) for one in ratings if len(one) > 1]
    if not shared:
        return None
    # Over all ordered pairs of n values the squared differences add up to 2 n^2 times their variance.
    observed = sum(2 * one.size**2 * one.var() / (one.size - 1) for one in shared)
    pooled = np.concatenate(shared)
    expected = 2 * pooled.size**2 * pooled.var() / (pooled.size - 1)
    return float(1 - observed / expected) if expected > 0 else None
