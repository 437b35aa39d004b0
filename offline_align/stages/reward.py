"""`reward`: a reward model on human preference pairs (Eq. 2), from the SFT policy."""

from typing import Any

from offline_align.config.runs import RewardRun
from offline_align.stages import training


def run(config: RewardRun, explicit: frozenset[str]) -> int:
    """Train a reward model on preference pairs."""

    def objective() -> Any:
        from offline_align.objectives.pairwise import pairwise

        return pairwise(config.method.use_margin, config.method.center_rewards_coefficient)

    recipe = training.Recipe(
        method="reward",
        kind="reward_model",
        read=training.read_pairs,
        read_validation=training.read_pairs,
        objective=objective,
    )
    return training.run("reward", config, explicit, recipe)
