"""Filtering Alignment (Eq. 4): learn from the rows whose reward is above a threshold, as in SFT."""

import math
from collections.abc import Iterable

from offline_align.data.records import LabelledSample
from offline_align.errors import ConfigError
from offline_align.methods import TrainingRow, checked


def keep(rows: Iterable[LabelledSample], threshold: float) -> list[TrainingRow]:
    """Return the rows with `reward > threshold` (strictly, Eq. 4), in their order; the others cost nothing.

    Raises ConfigError where the threshold is not a number or keeps no row, DataError for unusable rewards.
    """
    labelled = checked(rows)
    kept = [TrainingRow(row) for row in above(labelled, threshold)]
    if not kept:
        highest = max(row.reward for row in labelled)
        raise ConfigError(
            f"method.threshold={threshold}: keeps none of {len(labelled)} rows; "
            f"the highest reward is {highest:.4g}, set a threshold below it"
        )
    return kept


def above(rows: Iterable[LabelledSample], threshold: float) -> list[LabelledSample]:
    """Return the rows that Eq. 4 has a loss for; ConfigError where the threshold is not a number."""
    if math.isnan(threshold):
        raise ConfigError(f"method.threshold={threshold}: needs a number")
    return [row for row in rows if row.reward > threshold]
