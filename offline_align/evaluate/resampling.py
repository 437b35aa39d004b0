"""Compute percentile bootstrap intervals of means and of other functions of sums over clusters.

Shapes: C clusters (prompts), K summed quantities, J statistics, B resamples. Answers to the same
prompt are not independent, so the bootstrap resamples whole prompts.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from offline_align.evaluate.statistics import Floats

# Number of resampled counts in memory at once: 32 MiB of float64.
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic over prompts with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def mean_estimates(values: Floats, resamples: int, confidence: float, seed: int) -> list[Estimate]:
    """Return the mean of each column of `values` [C, K] with its interval.

    All columns, and all calls with the same seed and C, use the same resamples of the prompts, so
    comparisons are paired. With one prompt the interval has zero width.
    """
    clusters = len(values)
    return _estimates(values, lambda totals: totals / clusters, resamples, confidence, seed)


def estimate(
    sums: Floats, statistic: Callable[[Floats], Floats], resamples: int, confidence: float, seed: int
) -> Estimate:
    """Return `statistic` of the total of `sums` [C, K] with its interval.

    `statistic` maps totals [..., K] to values [...]. Resamples with an undefined statistic (a zero
    denominator) are ignored. All fields are NaN if none is left.
    """
    (found,) = _estimates(sums, lambda totals: statistic(totals)[..., None], resamples, confidence, seed)
    return found


def _estimates(
    sums: Floats, statistic: Callable[[Floats], Floats], resamples: int, confidence: float, seed: int
) -> list[Estimate]:
    """Return the J values of `statistic` (totals [..., K] to [..., J]) with their intervals."""
    clusters = len(sums)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // clusters)
    draws = []
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums.sum(axis=0))
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            counts = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size)
            draws.append(statistic(counts @ sums))
    columns = np.concatenate(draws).T
    return [_interval(float(value), column, confidence) for value, column in zip(values, columns, strict=True)]


def _interval(value: float, draws: Floats, confidence: float) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not draws.size:
        return Estimate(float("nan"), float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def cluster_sums(values: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Return [C, K]: sums of `values` [rows, K] by cluster, in order of first appearance."""
    index = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, [index[cluster] for cluster in clusters], values)
    return sums


def ratio(totals: Floats) -> Floats:
    """Return the first summed quantity divided by the second."""
    result: Floats = totals[..., 0] / totals[..., 1]
    return result


def kappa(totals: Floats) -> Floats:
    """Return Cohen's kappa of flattened square contingency tables [..., n * n]."""
    n = round(totals.shape[-1] ** 0.5)
    table = totals.reshape(*totals.shape[:-1], n, n)
    total = table.sum(axis=(-1, -2))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    expected = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    result: Floats = (observed - expected) / (1 - expected)
    return result
