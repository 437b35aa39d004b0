"""Recipes: the rows and the objective that distinguish one training stage from another.

Objectives are imported on use, because they import torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from offline_align.config.sections import MethodSection, RewardMethodSection
from offline_align.data.condition import Condition
from offline_align.data.records import LabelledSample, PreferencePair, Sample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.methods import MethodRows, RowFunction

if TYPE_CHECKING:
    from offline_align.objectives import Objective


@dataclass(frozen=True)
class RowRecipe:
    """The form of the rows in the files, and the function that makes training rows from them."""

    form: type[Sample] | type[PreferencePair]
    make: Callable[[Sequence[Any], Any, Renderer], MethodRows] | None = None
    """The function that makes training rows from rows of `form`, the settings of the method and the
    renderer. None for pairs, which are trained on directly."""


def _plain(rows: Sequence[Sample], settings: MethodSection | None, renderer: Renderer) -> MethodRows:
    return MethodRows([TrainingRow(row) for row in rows])


samples = RowRecipe(Sample, _plain)
"""SFT rows, each with weight 1."""
preference_pairs = RowRecipe(PreferencePair)
"""Preference pairs, for the reward model."""


def labelled(make: RowFunction[Any]) -> RowRecipe:
    """Return a source that reads labelled rows and turns them into training rows with `make`."""
    return RowRecipe(LabelledSample, make)


@dataclass(frozen=True)
class Recipe:
    """The kind of model that a training stage trains, the rows and the objective."""

    title: str
    """The name of the method in model cards."""
    makes: Literal["policy", "reward_model"]
    train: RowRecipe
    objective: Callable[[MethodSection | None], "Objective"]
    """Builds the objective from the settings of the method."""
    valid: RowRecipe = samples
    """The source of the validation rows; `train` is the one of the training rows."""
    condition: Callable[[Any], Condition] | None = None
    """Returns the condition that is stored with the policy, given the settings of the method."""


def next_token(settings: MethodSection | None) -> "Objective":
    """Return the objective of SFT, FA, RWR and CA (Eq. 1, 4, 5 and 6)."""
    from offline_align.objectives.next_token import next_token as objective

    return objective


def pairwise(settings: MethodSection | None) -> "Objective":
    """Return the objective of the reward model (Eq. 2)."""
    from offline_align.objectives.pairwise import pairwise as objective

    assert isinstance(settings, RewardMethodSection)
    return objective(settings.use_margin, settings.center_rewards_coefficient)
