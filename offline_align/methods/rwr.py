"""Reward-Weighted Regression (Eq. 5): learn from every row, weighted by `exp(reward / beta)`."""

import logging
import math
from collections.abc import Iterable, Sequence

from offline_align.config.sections import RewardWeightedMethodSection
from offline_align.data.records import LabelledSample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked

logger = logging.getLogger(__name__)


def training_rows(
    labelled: Sequence[LabelledSample], settings: RewardWeightedMethodSection, renderer: Renderer
) -> MethodRows:
    """Return all rows; their weights are scaled to mean 1 over those that are trained on.

    Says how many equally weighted rows these are worth. Raises as `weigh`.
    """
    rows = [TrainingRow(row) for row in checked(labelled)]

    def finalize(places: Sequence[int]) -> Finalized:
        weights = [row.weight for row in weigh((labelled[place] for place in places), settings.beta)]
        least, most, effective = min(weights), max(weights), effective_sample_size(weights)
        worth = f"effective sample size {effective:.0f} of {len(weights)} rows"
        logger.info("weights from %.3g to %.3g; %s", least, most, worth)
        return Finalized({"weight_min": least, "weight_max": most, "effective_sample_size": effective}, weights)

    return MethodRows(rows, finalize)


def weigh(rows: Iterable[LabelledSample], beta: float) -> list[TrainingRow]:
    """Return all rows with the weight `exp(reward / beta)` (Eq. 5), scaled to mean 1 over the rows.

    The rows are those that are trained on: the mean of a part of them would be another one.
    Raises ConfigError where beta is not positive, DataError for unusable rewards.
    """
    labelled = checked(rows)
    weights = scaled_weights([row.reward for row in labelled], beta)
    return [TrainingRow(row, weight) for row, weight in zip(labelled, weights, strict=True)]


def scaled_weights(rewards: Sequence[float], beta: float) -> list[float]:
    """Return `exp(reward / beta)` of finite rewards, scaled to mean 1.

    The scale is free, since the learning rate is, and with mean 1 a step stays as long as one of SFT.
    Raises ConfigError where beta is not positive.
    """
    if not (0 < beta < math.inf):
        raise ConfigError(f"method.beta={beta}: needs a positive number (paper: 5)")
    highest = max(rewards)
    # Relative to the highest reward no exponential can overflow, and one of them is 1.
    raw = [math.exp((reward - highest) / beta) for reward in rewards]
    mean = math.fsum(raw) / len(raw)
    return [weight / mean for weight in raw]


def effective_sample_size(weights: Sequence[float]) -> float:
    """Return Kish's `(sum w)^2 / sum w^2`: how many equally weighted rows would be as many."""
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
