"""Reward-Weighted Regression (Eq. 5): train on every row with the weight `exp(reward / beta)`."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from offline_align.config.sections import RewardWeightedMethodSection
from offline_align.data.records import LabelledSample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked

logger = logging.getLogger(__name__)


def training_rows(
    labelled: Sequence[LabelledSample], settings: RewardWeightedMethodSection, renderer: Renderer
) -> MethodRows:
    """Return all rows, with a `finalize` that weights those that are trained on to mean 1.

    `finalize` also logs the effective sample size. Raises as `weigh` does.
    """
    rows = [TrainingRow(row) for row in checked(labelled)]

    def finalize(places: Sequence[int]) -> Finalized:
        weights = [row.weight for row in weigh((labelled[place] for place in places), settings.beta)]
        return Finalized(weight_facts(weights), weights)

    return MethodRows(rows, finalize)


def weight_facts(weights: Sequence[float]) -> dict[str, float]:
    """Log the range of the weights and the effective sample size; return them for the manifest."""
    least, most, effective = min(weights), max(weights), effective_sample_size(weights)
    size = f"effective sample size {effective:.0f} of {len(weights)} rows"
    logger.info("weights from %.3g to %.3g; %s", least, most, size)
    return {"weight_min": least, "weight_max": most, "effective_sample_size": effective}


def weigh(rows: Iterable[LabelledSample], beta: float) -> list[TrainingRow]:
    """Return all rows with the weight `exp(reward / beta)` (Eq. 5), scaled to mean 1 over the rows.

    Pass exactly the rows that are trained on, since the scale depends on all of them. Raises
    ConfigError if beta is not positive, and DataError for unusable rewards.
    """
    labelled = checked(rows)
    weights = scaled_weights([row.reward for row in labelled], beta)
    return [TrainingRow(row, weight) for row, weight in zip(labelled, weights, strict=True)]


@dataclass(frozen=True)
class WeightScale:
    """The weights `exp(reward / beta)`, scaled to mean 1 over some rows."""

    beta: float
    highest: float
    """The highest reward of these rows."""
    mean: float
    """The mean of `exp((reward - highest) / beta)` over these rows."""

    def weight(self, reward: float) -> float:
        """Return the weight of a row. A reward above `highest` gets the weight of that one."""
        # Relative to the highest reward, no exponential overflows, and at least one is 1.
        return math.exp((min(reward, self.highest) - self.highest) / self.beta) / self.mean


def fit_scale(rewards: Sequence[float], beta: float) -> WeightScale:
    """Return the scale with which the weights of finite rewards have mean 1.

    The scale of the weights can be absorbed into the learning rate. With mean 1, steps have about the
    same size as in SFT. Raises ConfigError if beta is not positive.
    """
    if not (0 < beta < math.inf):
        raise ConfigError(f"method.beta={beta}: must be a positive number (paper: 5)")
    unscaled = WeightScale(beta, max(rewards), 1.0)
    return replace(unscaled, mean=math.fsum(map(unscaled.weight, rewards)) / len(rewards))


def scaled_weights(rewards: Sequence[float], beta: float) -> list[float]:
    """Return `exp(reward / beta)` of finite rewards, scaled to mean 1; raises as `fit_scale` does."""
    return list(map(fit_scale(rewards, beta).weight, rewards))


def effective_sample_size(weights: Sequence[float]) -> float:
    """Return Kish's effective sample size, `(sum w)^2 / sum w^2`."""
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
