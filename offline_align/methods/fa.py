"""Filtering Alignment (Eq. 4): learn from the rows whose reward is above a threshold, as in SFT."""

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
    """Return the kept rows; raises as `keep`."""
    kept = keep(labelled, settings.threshold, settings.best_of)
    facts = {"labelled": len(labelled), "kept": len(kept)}
    return MethodRows(kept, lambda places: Finalized(facts))


def keep(rows: Iterable[LabelledSample], threshold: float, best_of: int | None = None) -> list[TrainingRow]:
    """Return the rows with `reward > threshold` (strictly, Eq. 4), in their order; the others cost nothing.

    `best_of` keeps that many of them for each prompt, the best. Raises ConfigError where the threshold is not a
    number or keeps no row, DataError for unusable rewards.
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
    """Return the rows that Eq. 4 has a loss for; ConfigError where the threshold is not a number."""
    if math.isnan(threshold):
        raise ConfigError(f"method.threshold={threshold}: needs a number")
    kept = [row for row in rows if row.reward > threshold]
    return kept if best_of is None else _best(kept, best_of)


def _best(rows: Sequence[LabelledSample], best_of: int) -> list[LabelledSample]:
    """Return the best rows of each prompt, in their order; of equal rewards the first."""
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row.prompt].append(place)
    ranked = (sorted(some, key=lambda place: -rows[place].reward) for some in places.values())
    return [rows[place] for place in sorted(place for some in ranked for place in some[:best_of])]
