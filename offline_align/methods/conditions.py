"""What Conditional Alignment takes from its training rows: cut points of quantiles, bounds, the scale of weights.

Validation rows and generation use the same values, so a text means the same in all of them.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import groupby

from offline_align.config.sections import ConditionalMethodSection, ConditionKind
from offline_align.data.condition import AtLeastCondition, Condition, QuantileCondition, ValueCondition
from offline_align.data.records import LabelledSample
from offline_align.errors import ConfigError
from offline_align.methods.rwr import WeightScale, fit_scale


@dataclass(frozen=True)
class Bounds:
    """Bounds for rows, drawn from the rewards of the training rows."""

    rewards: Sequence[float] = field(repr=False)
    """Rewards of all training rows, increasing."""
    number: int
    """How many bounds each row gets."""
    seed: int

    def of(self, row: LabelledSample) -> list[float]:
        """Return the bounds of a row, which depend only on its id and reward, the seed and the training rewards.

        The training rewards up to the row's own, in order, are divided into `number` equal parts, and a
        bound is drawn from each. A row below all training rewards has its own reward as the bound.
        """
        reached = bisect_right(self.rewards, row.reward)
        if not reached:
            return [row.reward] * self.number
        draw = int.from_bytes(sha256(f"{self.seed}\0{row.id}".encode()).digest()[:8])
        # Place `(part + draw / 2^64) / number` of the way, in whole numbers, which are exact.
        places = (((part << 64) + draw) * reached // (self.number << 64) for part in range(self.number))
        return [self.rewards[place] for place in places]


@dataclass(frozen=True)
class Fitted:
    """What the training rows and the settings determine."""

    condition: Condition
    """Is stored with the policy."""
    bounds: Bounds | None = None
    """Set if rows are conditioned on bounds."""
    beta: float | None = None
    """Temperature of the weights; None if rows have none."""
    is_final: bool = False
    """Whether the rows that are trained on are known: those that fit."""
    scale: WeightScale | None = None
    """The scale of the weights over these rows, if rows have weights."""

    def numbers(self, row: LabelledSample) -> list[float]:
        """Return the number that each copy of a row states; a row has one copy unless it has several bounds."""
        if self.bounds is not None:
            return self.bounds.of(row)
        if isinstance(self.condition, QuantileCondition):
            return [self.condition.number_of(row.reward)]
        return [row.reward]

    def finalized(self, rewards: Sequence[float]) -> "Fitted":
        """Return the same with the scale of the weights, given the rewards of the rows that are trained on."""
        scale = None if self.beta is None else fit_scale(rewards, self.beta)
        return replace(self, is_final=True, scale=scale)

    def weights(self, rewards: Sequence[float]) -> list[float] | None:
        """Return the weights of rows, or None if they have none."""
        return None if self.scale is None else list(map(self.scale.weight, rewards))


def fit(rows: Sequence[LabelledSample], settings: ConditionalMethodSection, seed: int) -> Fitted:
    """Return what the training rows determine; their rewards are finite.

    Raises ConfigError for a target that is not the number of a quantile.
    """
    rewards = sorted(row.reward for row in rows)
    beta = settings.beta if settings.weight_by_reward else None
    if settings.condition is ConditionKind.quantile:
        return Fitted(_quantiles(rewards, settings), beta=beta)
    target = settings.target
    assert target is not None
    if settings.condition is ConditionKind.at_least:
        bounds = Bounds(rewards, settings.bounds, seed)
        return Fitted(AtLeastCondition(settings.reward_format, settings.reward_limit, target), bounds, beta)
    return Fitted(ValueCondition(settings.reward_format, settings.reward_limit, target), beta=beta)


def _quantiles(rewards: Sequence[float], settings: ConditionalMethodSection) -> QuantileCondition:
    cuts = cut_points(rewards, settings.quantiles)
    parts = [list(part) for _, part in groupby(rewards, key=lambda reward: bisect_left(cuts, reward))]
    means = tuple(math.fsum(part) / len(part) for part in parts)
    highest = QuantileCondition(settings.quantile_format, tuple(cuts), means, len(means))
    if settings.target is None:
        return highest
    try:
        return highest.asking(settings.target)
    except ConfigError as error:
        fewer = f"; many rewards are equal, so method.quantiles={settings.quantiles} gives only {len(means)}"
        raise ConfigError([problem + fewer for problem in error.problems]) from error


def cut_points(rewards: Sequence[float], quantiles: int) -> list[float]:
    """Return the highest reward of each quantile but the last, increasing; `rewards` are in order.

    Cut point j is the lowest reward that at least the share `j / quantiles` of the rows does not exceed,
    but below the highest reward. Equal rewards lie in one quantile. If many are, cut points coincide,
    and there are fewer quantiles; each has at least one row.
    """
    below = bisect_left(rewards, rewards[-1])
    places = (-(-j * len(rewards) // quantiles) - 1 for j in range(1, quantiles))
    return sorted({rewards[min(place, below - 1)] for place in places}) if below else []
