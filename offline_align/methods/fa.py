"""Filtering Alignment (Eq. 4): SFT on the rows whose reward is above a threshold."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from offline_align.config.sections import FilteringMethodSection
from offline_align.data.records import LabelledSample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked


def training_rows(
    labelled: Sequence[LabelledSample], settings: FilteringMethodSection, renderer: Renderer
) -> MethodRows:
    """Return the rows above the threshold. Raises as `keep` does."""
    kept = keep(labelled, settings.threshold, settings.best_of)
    facts = {"labelled": len(labelled), "kept": len(kept)}
    return MethodRows(kept, lambda places: Finalized(facts))


def keep(rows: Iterable[LabelledSample], threshold: float, best_of: int | None = None) -> list[TrainingRow]:
    """Return the rows with `reward > threshold` (strictly, Eq. 4), in their order.

    `best_of` keeps only this many of them per prompt, those with the highest rewards. Raises
    ConfigError if the threshold is not a number or keeps no row, and DataError for unusable rewards.
    """
    labelled = checked(rows)
    kept = [TrainingRow(row) for row in above(labelled, threshold, best_of)]
    if not kept:
        highest = max(row.reward for row in labelled)
        raise ConfigError(
            f"method.threshold={threshold}: keeps none of {len(labelled)} rows; "
            f"the highest reward is {highest:.4g}, set a threshold below it"
        )
    return kept


def above(rows: Iterable[LabelledSample], threshold: float, best_of: int | None = None) -> list[LabelledSample]:
    """Return the rows that `keep` keeps, possibly none; raises ConfigError if `threshold` is NaN."""
    if math.isnan(threshold):
        raise ConfigError(f"method.threshold={threshold}: must be a number")
    kept = [row for row in rows if row.reward > threshold]
    return kept if best_of is None else _best(kept, best_of)


def _best(rows: Sequence[LabelledSample], best_of: int) -> list[LabelledSample]:
    """Return the `best_of` best rows of each prompt, in their order. Ties go to the earlier row."""
    by_prompt = defaultdict(list)
    for index, row in enumerate(rows):
        by_prompt[row.prompt].append(index)
    ranked = (sorted(indices, key=lambda index: -rows[index].reward) for indices in by_prompt.values())
    return [rows[index] for index in sorted(index for indices in ranked for index in indices[:best_of])]
