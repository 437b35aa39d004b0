"""The three methods of the paper as pure functions: labelled rows -> training rows.

SFT, FA, RWR and CA minimise one loss, `sum_i w * (-log p(x_i | prompt, x_<i))` over response tokens
(Eq. 1, 4, 5, 6). They differ in which rows are there (`fa`), what a row weighs (`rwr`) and what
stands before its response (`ca`). Nothing here knows of tensors.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offline_align.data.records import LabelledSample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import DataError


@dataclass(frozen=True, slots=True)
class Finalized:
    """What a method says of the rows that are trained on, once those that do not fit are left out."""

    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""
    weights: Sequence[float] | None = None
    """The weight of each of these rows; None: the one that it has."""


@dataclass(frozen=True, slots=True)
class MethodRows:
    """What a method makes of a set of rows."""

    rows: list[TrainingRow]
    finalize: Callable[[Sequence[int]], Finalized] = lambda places: Finalized()
    """Called with the places in `rows` of those that are trained on."""


type RowFunction[Settings] = Callable[[Sequence[LabelledSample], Settings, Renderer], MethodRows]
"""Labelled rows, the settings of the method and the renderer of the policy; returns what is trained on."""


def checked(rows: Iterable[LabelledSample]) -> list[LabelledSample]:
    """Return the rows; DataError where there is none, or where a reward is not a finite number."""
    rows = list(rows)
    if not rows:
        raise DataError("the labelled files hold no usable row; run `label` on data that has some")
    for row in rows:
        if not math.isfinite(row.reward):
            raise DataError(f"row {row.id}: reward: {row.reward} is not a finite number; label the row again")
    return rows
