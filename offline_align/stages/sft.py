"""`sft`: supervised fine-tuning on prompts and responses (Eq. 1)."""

from typing import Any

from offline_align.config.runs import TrainRun
from offline_align.stages import training


def run(config: TrainRun, explicit: frozenset[str]) -> int:
    """Train a policy on SFT rows."""
    recipe = training.Recipe(
        method="sft",
        kind="policy",
        read=training.read_samples,
        read_validation=training.read_samples,
        objective=next_token_objective,
    )
    return training.run("sft", config, explicit, recipe)


def next_token_objective() -> Any:
    """Return the objective of SFT, FA, RWR and CA."""
    from offline_align.objectives.next_token import next_token

    return next_token
