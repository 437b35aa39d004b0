"""What makes one training stage different from another: its rows and its objective.

Objectives need torch, so they are imported when they are asked for.
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
class RowSource:
    """The form of the rows in the files, and the function that makes training rows of them."""

    form: type[Sample] | type[PreferencePair]
    make: Callable[[Sequence[Any], Any, Renderer], MethodRows] | None = None
    """Rows of `form`, the settings of the method and the renderer; None if pairs are trained on as they are."""


def _plain(rows: Sequence[Sample], settings: MethodSection | None, renderer: Renderer) -> MethodRows:
    return MethodRows([TrainingRow(row) for row in rows])


samples = RowSource(Sample, _plain)
"""SFT rows, all of weight 1."""
preference_pairs = RowSource(PreferencePair)


def labelled(make: RowFunction[Any]) -> RowSource:
    """Return labelled rows, of which a method makes training rows."""
    return RowSource(LabelledSample, make)


@dataclass(frozen=True)
class Recipe:
    """What a training stage trains, from which rows, with which objective."""

    title: str
    """The method in words, for model cards."""
    makes: Literal["policy", "reward_model"]
    train: RowSource
    objective: Callable[[MethodSection | None], "Objective"]
    """Builds the objective from the settings of the method."""
    valid: RowSource = samples
    """Rows for validation."""
    condition: Callable[[Any], Condition] | None = None
    """The condition that the policy stores, from the settings of the method."""


def next_token(settings: MethodSection | None) -> "Objective":
    """Return the objective of SFT, FA, RWR and CA (Eq. 1, 4, 5 and 6)."""
    from offline_align.objectives.next_token import next_token as objective

    return objective


def pairwise(settings: MethodSection | None) -> "Objective":
    """Return the objective of the reward model (Eq. 2)."""
    from offline_align.objectives.pairwise import pairwise as objective

    assert isinstance(settings, RewardMethodSection)
    return objective(settings.use_margin, settings.center_rewards_coefficient)
