"""`rwr`: Reward-Weighted Regression (Eq. 5): every row weighs exp(reward / beta)."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from offline_align.config.runs import RewardWeightedRun
from offline_align.data.records import BadRows, LabelledSample
from offline_align.data.template import Renderer
from offline_align.methods import TrainingRow, checked, rwr
from offline_align.stages import training
from offline_align.stages.sft import next_token_objective

logger = logging.getLogger(__name__)


def run(config: RewardWeightedRun, explicit: frozenset[str]) -> int:
    """Train a policy on all rows, weighted; the weights have mean 1 over the rows that are trained on."""

    def read(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> training.Rows:
        labelled = checked(training.read_labelled(paths, bad_rows))
        return training.Rows([TrainingRow(row) for row in labelled], partial(_settle, labelled, config.method.beta))

    recipe = training.Recipe(
        method="rwr",
        kind="policy",
        read=read,
        read_validation=training.read_samples,
        objective=next_token_objective,
    )
    return training.run("rwr", config, explicit, recipe)


def _settle(labelled: Sequence[LabelledSample], beta: float, places: Sequence[int]) -> training.Settled:
    """Weigh the rows that are left; only of these is the mean weight 1."""
    weights = [row.weight for row in rwr.weigh((labelled[place] for place in places), beta)]
    least, most, effective = min(weights), max(weights), rwr.effective_sample_size(weights)
    logger.info(
        "weights from %.3g to %.3g; effective sample size %.0f of %d rows", least, most, effective, len(weights)
    )
    facts = {"weight_min": least, "weight_max": most, "effective_sample_size": effective}
    return training.Settled(facts, weights)
