"""Compute numbers of answers and a step of PPO's two models in the layout that is given as JSON, and write them:

torchrun --nproc-per-node=2 -m tests.distributed.rollout_numbers '{"context_parallel_size": 2}' out.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from offline_align.config.sections import (
    Device,
    OptimSection,
    ParallelSection,
    PolicyOptimizationMethodSection,
    RunSection,
)
from offline_align.data.loader import Loader
from offline_align.data.pack import padding_multiple
from offline_align.data.rollout import RolloutColumns
from offline_align.data.rollout_source import RolloutSource
from offline_align.distributed.setup import Ranks, session
from tests.unit.data.test_rollout_source import answer
from tests.unit.model.test_shared_prompts import MODEL

CAPACITY = 40


def answers() -> RolloutSource:
    """Return answers with columns that make no loss trivial."""
    draw = np.random.Generator(np.random.PCG64(4))
    sizes = [(5, 3), (20, 1), (1, 9), (12, 12), (3, 2), (9, 14), (2, 5)]
    given = [answer(f"r{n}", *(draw.integers(0, 90, k).tolist() for k in n)) for n in sizes]
    columns = draw.normal(size=(5, sum(n for _, n in sizes))).astype(np.float32)
    columns[0] = columns[0] / 10 - 4.5  # about the log-probability of a token under a random policy
    return RolloutSource(given, RolloutColumns(*columns))


def of_model(kind: Any, parallel: ParallelSection, ranks: Ranks) -> dict[str, Any]:
    """Return a number for each target, and the result of one optimizer step."""
    from offline_align.model.build import build_model
    from offline_align.model.context_sum import at_all_targets
    from offline_align.model.heads import RewardModel
    from offline_align.model.passes import target_numbers
    from offline_align.objectives.ppo import actor, critic
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    model = build_model(kind, MODEL, parallel, ranks.device, bf16=False)
    if isinstance(model, RewardModel):
        model.reads_targets = True
    source, split = answers(), parallel.sequence_parallel
    found = target_numbers(lambda b: at_all_targets(model(b), b), source, CAPACITY, ranks, split)
    wrapped = wrap_model(model, parallel, on_cuda=False)
    optimizer = build_optimizer(wrapped, OptimSection(), parallel, bf16=False, on_cuda=False)
    objective = (actor if kind == "policy" else critic)(PolicyOptimizationMethodSection())
    step = TrainStep(wrapped, optimizer, objective, clip_grad=1.0)
    place = ranks.dp_rank, ranks.dp_size, padding_multiple(ranks.tp_size, ranks.cp_size, split)
    loader = Loader(source, len(source), len(source), CAPACITY, 1, *place, ranks.cp_rank, ranks.cp_size)
    result = step(loader.step(0).micro_batches, learning_rate=1e-3)
    again = target_numbers(lambda b: at_all_targets(model(b), b), source, CAPACITY, ranks, split)
    return {
        "before": [row.tolist() for row in found],
        "after": [row.tolist() for row in again],
        "count": result.count,
        "step": result.metrics | {"grad_norm": result.grad_norm},
    }


def main(layout: str, target: str) -> None:
    """Write the results of both models."""
    parallel = ParallelSection(**json.loads(layout))
    with session(parallel, RunSection(dir="unused", seed=5, device=Device.cpu)) as ranks:
        found = {kind: of_model(kind, parallel, ranks) for kind in ("policy", "reward_model")}
        if ranks.is_main:
            Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
