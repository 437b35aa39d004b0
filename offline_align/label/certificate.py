"""Label certificate: score a random part of the rows again and compare.

The second time each row is scored alone, on another rank, with a newly loaded model. A reward that
depends on the other rows of its bin or on the rank shows up here.
"""

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from offline_align.label.statistics import RewardStats, normalise
from offline_align.wording import counted

FILE_NAME = "certificate.json"


def choose_rows(count: int, fraction: float, seed: int) -> list[int]:
    """Return a random `fraction` of `count` rows in ascending order: at least one, none if it is 0."""
    wanted = min(count, math.ceil(fraction * count))
    return sorted(Random(seed).sample(range(count), wanted))


def certify(first: Sequence[float], again: Sequence[float], stats: RewardStats) -> dict[str, Any]:
    """Return how far two computations of the raw rewards [N] differ, and which decisions change.

    A rank flip is a pair of rows whose order is reversed. A sign flip is a row that moves across a
    normalised reward of 0, the usual threshold of filtering.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(again, dtype=np.float64)
    above, again_above = normalise(a, stats) > 0, normalise(b, stats) > 0
    difference = float(np.abs(a - b).max())
    return {
        "rows": int(a.size),
        "largest_difference": difference,
        "largest_normalised_difference": difference / stats.scale.std if stats.scale.std else 0.0,
        "equal_rows": int((a == b).sum()),
        "pairs": a.size * (a.size - 1) // 2,
        "rank_flips": sum(int(((a[k] - a[:k]) * (b[k] - b[:k]) < 0).sum()) for k in range(a.size)),
        "sign_flips": int((above != again_above).sum()),
    }


def in_words(found: Mapping[str, Any]) -> str:
    """Return the certificate as one sentence."""
    return (
        f"{counted(found['rows'], 'row')} scored again, alone: largest difference {found['largest_difference']:.3g} "
        f"({found['largest_normalised_difference']:.3g} standard deviations), {found['rank_flips']} of "
        f"{counted(found['pairs'], 'pair')} changed order, {counted(found['sign_flips'], 'row')} changed sides of "
        "the threshold 0."
    )
