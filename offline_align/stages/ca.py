"""`ca`: Conditional Alignment (Eq. 6): the reward of a row is written before its response."""

from pathlib import Path

from offline_align.config.runs import ConditionalRun
from offline_align.data.records import BadRows
from offline_align.data.template import Renderer
from offline_align.methods import ca
from offline_align.model.description import Condition
from offline_align.stages import training
from offline_align.stages.sft import next_token_objective


def run(config: ConditionalRun, explicit: frozenset[str]) -> int:
    """Train a policy on all rows, each under its own reward; the condition is stored in the policy."""
    method = config.method

    def read(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> training.Rows:
        labelled = training.read_labelled(paths, bad_rows)
        rewards = [row.reward for row in labelled]
        ca.check_stable(renderer, [*rewards, method.target_reward], method.reward_format, method.reward_limit)

        def settle(places: list[int]) -> training.Settled:
            left = [rewards[place] for place in places]
            return training.Settled({"reward_min": min(left), "reward_max": max(left)})

        return training.Rows(ca.condition(labelled, method.reward_format, method.reward_limit), settle)

    recipe = training.Recipe(
        method="ca",
        kind="policy",
        read=read,
        # Validation rows have rewards too, and are read under them.
        read_validation=read,
        objective=next_token_objective,
        condition=Condition(method.reward_format, method.reward_limit, method.target_reward),
    )
    return training.run("ca", config, explicit, recipe)
