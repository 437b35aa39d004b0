"""Means with confidence intervals, win rates and rank scores over prompts; plain numpy.

Shapes: P prompts, M methods, C columns (any quantities whose means over prompts are wanted).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Resampled counts held in memory at once: 32 MiB of float64.
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


def mean_estimates(values: Floats, resamples: int, confidence: float, seed: int) -> list[Estimate]:
    """Return the mean of each column of `values` [P, C] with its percentile bootstrap interval.

    Whole prompts are drawn again, the same ones for all columns and for every call with this seed and P,
    so that comparisons stay paired. With one prompt the interval is a point.
    """
    prompts, columns = values.shape
    draws = np.empty((resamples, columns))
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // prompts)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=size)
        draws[start : start + size] = counts @ values / prompts
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(values.mean(0), low, high, strict=True)]


def wins(scores: Floats) -> Floats:
    """Return [P, M, M]: 1 where the row's method scores above the column's, 0.5 for a tie, else 0."""
    own, other = scores[:, :, None], scores[:, None, :]
    return np.where(own > other, 1.0, np.where(own == other, 0.5, 0.0))


def rank_scores(scores: Floats) -> Floats:
    """Return [P, M]: (M + 1) - rank among the M methods, so that the best has M; ties share the mean rank.

    With the paper's five methods this is its `6 - rank` (Figure 4).
    """
    # 1, and 1 for each method below; the half that a method wins against itself is taken off.
    result: Floats = wins(scores).sum(axis=2) - 0.5 + 1.0
    return result


def distinct_n(responses: Sequence[str], n: int) -> float:
    """Return the share of distinct word n-grams among all word n-grams of the responses; 0 without any."""
    total = 0
    seen: set[tuple[str, ...]] = set()
    for response in responses:
        words = response.lower().split()
        grams = list(zip(*(words[k:] for k in range(n)), strict=False))
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else 0.0
