"""Recipes: the rows and the objective that distinguish one training stage from another.

Objectives are imported on use, because they import torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from offline_align.config.sections import MethodSection, PreferenceMethodSection, RewardMethodSection
from offline_align.data.condition import Condition
from offline_align.data.records import (
    BadRows,
    LabelledSample,
    PreferencePair,
    Sample,
    TrainingRow,
    read_rows,
    read_rows_and_pairs,
)
from offline_align.data.template import Renderer
from offline_align.methods import MethodPairs, MethodRows, RowFunction, dpo

if TYPE_CHECKING:
    from offline_align.objectives import Objective


def settings_alone(rows: Sequence[Any], settings: Any, seed: int) -> Any:
    """Return the settings: nothing else decides what a row becomes."""
    return settings


@dataclass(frozen=True)
class RowRecipe:
    """The form of the rows in the files, and the functions that make training rows from them."""

    form: type[Sample]
    make: Callable[[Sequence[Any], Any, Renderer], MethodRows]
    """Makes training rows from rows of `form`, what `fit` returned for the training rows, and the
    renderer."""
    fit: Callable[[Sequence[Any], Any, int], Any] = settings_alone
    """Takes the rows of `data.train`, the settings of the method and `run.seed`; returns what decides
    what a row becomes, for training and validation rows alike. `MethodRows.finalize` may replace it."""


@dataclass(frozen=True)
class PairRecipe:
    """The forms of the rows in the files, and the function that makes training pairs from them."""

    also: type[LabelledSample] | None
    """The form of the rows that are not pairs; None if all rows must be pairs."""
    make: Callable[[Sequence[Any], Any], MethodPairs]
    """The function that makes training pairs from the rows and the settings of the method."""

    def read(self, paths: Sequence[Path], bad_rows: BadRows, every: int = 1) -> list[Any]:
        """Return the rows of the files; parameters and errors as for `read_rows`."""
        if self.also is None:
            return list(read_rows(paths, PreferencePair, bad_rows, every))
        return list(read_rows_and_pairs(paths, self.also, bad_rows, every))


def _plain(rows: Sequence[Sample], settings: MethodSection | None, renderer: Renderer) -> MethodRows:
    return MethodRows([TrainingRow(row) for row in rows])


def _given(rows: Sequence[PreferencePair], settings: MethodSection | None) -> MethodPairs:
    return MethodPairs([*rows])


samples = RowRecipe(Sample, _plain)
"""SFT rows, each with weight 1."""
preference_pairs = PairRecipe(None, _given)
"""Preference pairs, for the reward model."""
ranked_answers = PairRecipe(LabelledSample, dpo.training_pairs)
"""Preference pairs, and labelled answers that pairs are made of."""


def labelled(make: RowFunction[Any], fit: Callable[[Sequence[Any], Any, int], Any] = settings_alone) -> RowRecipe:
    """Return a source that reads labelled rows and turns them into training rows with `make`."""
    return RowRecipe(LabelledSample, make, fit)


@dataclass(frozen=True)
class Recipe:
    """The kind of model that a training stage trains, the rows and the objective."""

    title: str
    """The name of the method in model cards."""
    makes: Literal["policy", "reward_model"]
    train: RowRecipe | PairRecipe
    objective: Callable[[MethodSection | None], "Objective"]
    """Builds the objective from the settings of the method."""
    valid: RowRecipe | PairRecipe = samples
    """The source of the validation rows; `train` is the one of the training rows."""
    condition: Callable[[Any], Condition] | None = None
    """Returns the condition that is stored with the policy, given what the training rows determine."""
    needs_reference: bool = False
    """Whether the objective compares the likelihoods of answers with those at the start of the run. Then
    both `train` and `valid` are pairs."""


def next_token(settings: MethodSection | None) -> "Objective":
    """Return the objective of SFT, FA, RWR and CA (Eq. 1, 4, 5 and 6)."""
    from offline_align.objectives.next_token import next_token as objective

    return objective


def pairwise(settings: MethodSection | None) -> "Objective":
    """Return the objective of the reward model (Eq. 2)."""
    from offline_align.objectives.pairwise import pairwise as objective

    assert isinstance(settings, RewardMethodSection)
    return objective(settings.use_margin, settings.center_rewards_coefficient)


def preference(settings: MethodSection | None) -> "Objective":
    """Return the objective of DPO and IPO."""
    from offline_align.objectives.preference import preference as objective

    assert isinstance(settings, PreferenceMethodSection)
    return objective(settings)
