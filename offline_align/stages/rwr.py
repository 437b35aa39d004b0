"""`rwr`: Reward-Weighted Regression (Eq. 5): every row weighs exp(reward / beta)."""

import logging
from pathlib import Path

from offline_align.config.runs import RewardWeightedRun
from offline_align.data.records import BadRows
from offline_align.data.template import Renderer
from offline_align.methods import rwr
from offline_align.stages import training
from offline_align.stages.sft import next_token_objective

logger = logging.getLogger(__name__)


def run(config: RewardWeightedRun, explicit: frozenset[str]) -> int:
    """Train a policy on all rows, weighted; the weights have mean 1 over the data."""

    def read(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> training.Rows:
        rows = rwr.weigh(training.read_labelled(paths, bad_rows), config.method.beta)
        weights = [row.weight for row in rows]
        effective = rwr.effective_sample_size(weights)
        logger.info(
            "weights from %.3g to %.3g; effective sample size %.0f of %d rows",
            min(weights),
            max(weights),
            effective,
            len(weights),
        )
        facts = {"weight_min": min(weights), "weight_max": max(weights), "effective_sample_size": effective}
        return training.Rows(rows, facts)

    recipe = training.Recipe(
        method="rwr",
        kind="policy",
        read=read,
        read_validation=training.read_samples,
        objective=next_token_objective,
    )
    return training.run("rwr", config, explicit, recipe)
