"""Reward-Weighted Regression (Eq. 5): train on every row with the weight `exp(reward / beta)`."""

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
    """Return all rows, with a `finalize` that weights those that are trained on to mean 1.

    `finalize` also logs the effective sample size. Raises as `weigh` does.
    """
    rows = [TrainingRow(row) for row in checked(labelled)]

    def finalize(places: Sequence[int]) -> Finalized:
        weights = [row.weight for row in weigh((labelled[place] for place in places), settings.beta)]
        least, most, effective = min(weights), max(weights), effective_sample_size(weights)
        size = f"effective sample size {effective:.0f} of {len(weights)} rows"
        logger.info("weights from %.3g to %.3g; %s", least, most, size)
        return Finalized({"weight_min": least, "weight_max": most, "effective_sample_size": effective}, weights)

    return MethodRows(rows, finalize)


def weigh(rows: Iterable[LabelledSample], beta: float) -> list[TrainingRow]:
    """Return all rows with the weight `exp(reward / beta)` (Eq. 5), scaled to mean 1 over the rows.

    Pass exactly the rows that are trained on, since the scale depends on all of them. Raises
    ConfigError if beta is not positive, and DataError for unusable rewards.
    """
    labelled = checked(rows)
    weights = scaled_weights([row.reward for row in labelled], beta)
    return [TrainingRow(row, weight) for row, weight in zip(labelled, weights, strict=True)]


def scaled_weights(rewards: Sequence[float], beta: float) -> list[float]:
    """Return `exp(reward / beta)` of finite rewards, scaled to mean 1.

    The scale of the weights can be absorbed into the learning rate. With mean 1, steps have about the
    same size as in SFT. Raises ConfigError if beta is not positive.
    """
    if not (0 < beta < math.inf):
        raise ConfigError(f"method.beta={beta}: must be a positive number (paper: 5)")
    highest = max(rewards)
    # Relative to the highest reward, no exponential overflows, and at least one is 1.
    raw = [math.exp((reward - highest) / beta) for reward in rewards]
    mean = math.fsum(raw) / len(raw)
    return [weight / mean for weight in raw]


def effective_sample_size(weights: Sequence[float]) -> float:
    """Return Kish's effective sample size, `(sum w)^2 / sum w^2`."""
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
