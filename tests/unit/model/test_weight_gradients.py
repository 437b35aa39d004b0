"""Gradients that projections add to `main_grad` directly equal those of autograd."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from offline_align.config.sections import ModelSection, ParallelSection, Recompute, RunSection
from offline_align.data.bins import PairSource, SampleSource
from offline_align.distributed.setup import Ranks, session
from tests.unit.model.test_shared_prompts import MODEL, pairs

TIED = replace(MODEL, share_embeddings_and_output_weights=True)
BY_THEMSELVES = (
    "word_embeddings.weight",
    "linear_qkv.weight",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc2.weight",
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full])
@pytest.mark.parametrize("model", [MODEL, TIED], ids=["own output layer", "output layer is the embedding"])
def test_a_policy(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, model: ModelSection, recompute: Recompute) -> None:
    from offline_align.model import vocabulary

    # Several chunks of logits, whose residuals are recomputed.
    monkeypatch.setattr(vocabulary, "LOGITS_PIECE_BYTES", {"cpu": 4 * 8 * 128})
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT_BYTES", 0)
    batches = [SampleSource(pairs().chosen).collate(rows, 1) for rows in (range(2), range(2, 4))]
    names = assert_main_gradients(ranks, "policy", model, batches, recompute)
    output = set() if model is TIED else {"output_layer.weight"}
    assert {name for name in names if not name.endswith(BY_THEMSELVES)} == output
    assert "embedding.word_embeddings.weight" in names


def test_a_reward_model(ranks: Ranks) -> None:
    batches = [PairSource(pairs(), True).collate(rows, 1) for rows in (range(2), range(2, 4))]
    names = assert_main_gradients(ranks, "reward_model", MODEL, batches, Recompute.none)
    assert names and all(name.endswith(BY_THEMSELVES) for name in names)


def assert_main_gradients(
    ranks: Ranks, kind: str, section: ModelSection, batches: list[Any], recompute: Recompute
) -> set[str]:
    """Compare sums over micro-batches with autograd's; return the weights that megatron's hook did not add."""
    from offline_align.model.build import build_model
    from offline_align.train.optim import wrap_model

    parallel = ParallelSection()
    alone, inner = (build_model(kind, section, parallel, ranks.device, False, recompute) for _ in range(2))
    inner.load_state_dict(alone.state_dict())
    wrapped = wrap_model(inner, parallel, False)
    for model in (alone, wrapped):
        for batch in batches:
            (model(batch) * torch.arange(1.0, 1.0 + model(batch).numel())).sum().backward()
    left_alone = set()
    for (name, expected), (_, found) in zip(alone.named_parameters(), inner.named_parameters(), strict=True):
        marked: Any = found
        assert expected.grad is not None and expected.grad.any(), name
        assert torch.allclose(marked.main_grad, expected.grad, rtol=1e-4, atol=1e-5), name
        left_alone |= {name} if marked.grad_added_to_main_grad else set()
    return left_alone


def test_sums_of_another_type() -> None:
    from offline_align.model.weight_gradients import add_product

    out_grad, inputs = torch.randn(5, 3).bfloat16(), torch.randn(5, 4).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        total = torch.ones(3, 4, dtype=dtype)
        add_product(total, out_grad, inputs)
        assert total.dtype is dtype
        assert torch.allclose(total.float(), 1 + out_grad.float().t() @ inputs.float(), rtol=0.02, atol=0.02)
