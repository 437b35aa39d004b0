"""Bootstrap intervals of anything that is a function of sums over clusters (prompts); plain numpy.

Shapes: C clusters, K summed quantities, B resamples. Answers to one prompt are not independent, so whole prompts are
drawn again.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from offline_align.evaluate.statistics import Estimate, Floats


def cluster_sums(values: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Return [C, K] sums of `values` [rows, K] within each cluster, in the order of first appearance."""
    index = {cluster: k for k, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(index), values.shape[1]))
    np.add.at(sums, [index[cluster] for cluster in clusters], values)
    return sums


def estimate(
    sums: Floats, statistic: Callable[[Floats], Floats], resamples: int, confidence: float, seed: int
) -> Estimate:
    """Return `statistic` of the total of `sums` [C, K] with its percentile bootstrap interval.

    `statistic` maps totals [..., K] to values [...]; resamples in which it has no value (an empty denominator) are
    left out, and NaN is returned where no value is left.
    """
    counts = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(axis=0)))
        draws = statistic(counts @ sums)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not draws.size:
        return Estimate(float("nan"), float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


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
