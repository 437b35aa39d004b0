"""The three methods of the paper as pure functions from labelled rows to training rows.

SFT, FA, RWR and CA minimise the same loss, `sum_i w * (-log p(x_i | prompt, x_<i))` over the
response tokens (Eq. 1, 4, 5, 6). FA selects rows, RWR weights them, and CA puts a text before each
response. This package does not use tensors.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offline_align.data.records import LabelledSample, PreferencePair, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import DataError


@dataclass(frozen=True, slots=True)
class Finalized:
    """What a method computes from the final training rows, without those that are too long."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Entries for the manifest."""
    weights: Sequence[float] | None = None
    """The weight of each of these rows, or None to keep the weights of the rows."""
    fitted: Any = None
    """What validation rows are made with and the policy stores; None: what the rows were made with."""


@dataclass(frozen=True, slots=True)
class MethodRows:
    """The training rows of a method."""

    rows: list[TrainingRow]
    finalize: Callable[[Sequence[int]], Finalized] = lambda places: Finalized()
    """Called with the indices into `rows` of the rows that fit and are trained on."""


@dataclass(frozen=True, slots=True)
class MethodPairs:
    """The training pairs of a method."""

    pairs: list[PreferencePair]
    facts: dict[str, Any] = field(default_factory=dict)
    """Entries for the manifest."""


type RowFunction[Fitted] = Callable[[Sequence[LabelledSample], Fitted, Renderer], MethodRows]
"""Takes labelled rows, the method's settings or what they and the training rows determine, and the
policy's renderer; returns training rows."""


def checked(rows: Iterable[LabelledSample]) -> list[LabelledSample]:
    """Return the rows as a list. Raises DataError if there are none or a reward is not finite."""
    rows = list(rows)
    if not rows:
        raise DataError("the labelled files hold no usable row; run `label` on data that has some")
    for row in rows:
        if not math.isfinite(row.reward):
            raise DataError(f"row {row.id}: reward: {row.reward} is not a finite number; label the row again")
    return rows
