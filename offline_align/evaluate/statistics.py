"""Compute win rates, rank scores and shares of distinct n-grams with numpy.

Shapes: P prompts, M methods.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def wins(scores: Floats) -> Floats:
    """Return [P, M, M]: 1 if the row's method scores above the column's, 0.5 for a tie, else 0."""
    own, other = scores[:, :, None], scores[:, None, :]
    return np.where(own > other, 1.0, np.where(own == other, 0.5, 0.0))


def rank_scores(scores: Floats) -> Floats:
    """Return [P, M]: (M + 1) - rank, so the best of M methods has M; ties share the mean rank.

    With the paper's five methods this is its `6 - rank` (Figure 4).
    """
    # 1 plus one for each method below; `wins` counts half a win of each method against itself.
    result: Floats = wins(scores).sum(axis=2) - 0.5 + 1.0
    return result


def distinct_n(responses: Sequence[str], n: int) -> float:
    """Return the share of distinct n-grams among all word n-grams; 0 if there are none."""
    total = 0
    seen: set[tuple[str, ...]] = set()
    for response in responses:
        words = response.lower().split()
        grams = list(zip(*(words[k:] for k in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0
