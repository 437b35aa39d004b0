"""Rows without targets do not change a step, and a step of only such rows is finite."""

from dataclasses import replace

import numpy as np
import pytest

from offline_align.config.sections import ModelSection, OptimSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import session

MODEL = ModelSection(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=90
)
LENGTHS = [9, 16, 12, 7]
MASKED = 2


def source() -> SampleSource:
    """Return four rows, of which one has no target and the last has one target."""
    ids = np.random.Generator(np.random.PCG64(1)).integers(0, 90, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    starts = np.array([3, 5, LENGTHS[MASKED], LENGTHS[3] - 1], np.int32)
    return SampleSource(TokenizedRows(ids, offsets, starts, np.ones(4, np.float32), list("abcd"), {}, 0))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_masked_row_changes_nothing_and_a_masked_step_is_finite(bf16: bool) -> None:
    from offline_align.model.build import build_model
    from offline_align.objectives.next_token import next_token
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    found = []
    parallel = ParallelSection()
    for rows in ([0, 1, MASKED, 3], [0, 1, 3]):
        with session(parallel, RunSection(dir="unused", seed=5)) as ranks:
            model = wrap_model(build_model("policy", MODEL, parallel, ranks.device, bf16), parallel, on_cuda=False)
            optim = replace(OptimSection(), lr=1e-2)
            step = TrainStep(model, build_optimizer(model, optim, parallel, bf16, on_cuda=False), next_token, 1.0)
            results = [step([source().collate([row], 1) for row in rows], 1e-2) for _ in range(2)]
            empty = step([source().collate([MASKED], 1)], 1e-2)
            found.append([(r.metrics["loss"], r.count, r.grad_norm, r.applied) for r in results])
            assert (empty.metrics["loss"], empty.count, empty.grad_norm, empty.applied) == (0.0, 0, 0.0, True)
    # The rows have 6, 11, 0 and 1 targets.
    assert [count for _, count, _, _ in found[0]] == [18, 18]
    assert found[0] == found[1]
