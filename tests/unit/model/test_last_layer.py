"""The last layer's MLP computes only the positions that are read, with the results of the whole sequence."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_align.config.sections import ParallelSection, RunSection
from offline_align.data.bins import PairSource, SampleSource
from offline_align.distributed.setup import Ranks, session
from tests.unit.model.test_shared_prompts import MODEL, pairs


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


def rows_of_each_mlp(model: Any) -> list[int]:
    """Return a list to which later forward passes append the number of rows in the input of each MLP."""
    seen: list[int] = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].size(0)))
    return seen


def test_a_policy_reads_targets(ranks: Ranks) -> None:
    from offline_align.model.build import build_model
    from offline_align.model.heads import Policy

    model = build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=False)
    assert isinstance(model, Policy)
    batch = SampleSource(pairs().chosen).collate(range(4), 1)
    seen = rows_of_each_mlp(model)
    nll = model(batch)
    tokens, targets = batch.tokens.numel(), batch.target_index.numel()
    assert seen == [tokens, tokens, -(-targets // 16) * 16]
    seen.clear()
    logits = model.logits(batch)[:, : MODEL.vocab_size]
    assert seen == [tokens] * 3
    whole = -logits.log_softmax(-1)[batch.target_index, batch.target_ids]
    assert torch.allclose(nll, whole, atol=1e-5)
    assert_same_gradients(model, nll, whole)


def test_a_reward_model_reads_last_tokens(ranks: Ranks) -> None:
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=False)
    batch = PairSource(pairs(), True).collate(range(4), 1)
    seen = rows_of_each_mlp(model)
    assert model(batch).numel() == 8
    assert seen == [batch.tokens.numel()] * 2 + [16]


def test_a_bin_without_rows_is_computed_all_the_same(ranks: Ranks) -> None:
    from offline_align.model.build import build_model

    for kind, batch in (
        ("policy", SampleSource(pairs().chosen).collate([], 4)),
        ("reward_model", PairSource(pairs(), True).collate([], 4)),
    ):
        model = build_model(kind, MODEL, ParallelSection(), ranks.device, bf16=False)
        out = model(batch)
        assert out.numel() == 0
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def assert_same_gradients(model: Any, first: Tensor, second: Tensor) -> None:
    found = []
    for output in (first, second):
        model.zero_grad()
        torch.autograd.backward(output.sum())
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name
