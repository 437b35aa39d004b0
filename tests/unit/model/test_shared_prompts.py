"""With a shared prompt, scores, likelihoods and gradients equal those of rows with their own prompts."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_align.config.sections import ModelSection, ParallelSection, RunSection
from offline_align.data.bins import PairSource, SampleSource
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows
from offline_align.distributed.setup import Ranks, session

MODEL = ModelSection(
    num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=90
)
# Lengths of prompt, chosen and rejected answer. The second prompt is too short to share, and the last
# two answers have a common beginning.
PAIRS = [(40, 9, 3), (5, 20, 4), (16, 1, 30), (70, 12, 12)]
ALIKE = 6


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


def rows(ids: list[list[int]], starts: list[int]) -> TokenizedRows:
    flat, offsets = np.array(list(chain.from_iterable(ids)), np.int32), np.cumsum([0, *map(len, ids)]).astype(np.int64)
    weights = np.linspace(0.5, 2, len(ids)).astype(np.float32)
    return TokenizedRows(flat, offsets, np.array(starts, np.int32), weights, [str(n) for n in range(len(ids))], {}, 0)


def pairs() -> TokenizedPairs:
    draw = np.random.Generator(np.random.PCG64(1))
    chosen, rejected = [], []
    for number, (prompt, first, second) in enumerate(PAIRS):
        given, answers = draw.integers(0, 90, prompt).tolist(), draw.integers(0, 90, (2, 40)).tolist()
        if number == len(PAIRS) - 1:
            answers[1][:ALIKE] = answers[0][:ALIKE]
        chosen.append(given + answers[0][:first])
        rejected.append(given + answers[1][:second])
    starts = [prompt for prompt, _, _ in PAIRS]
    return TokenizedPairs(
        rows(chosen, starts), rows(rejected, starts), np.zeros(len(PAIRS), np.float32), list("abcd"), {}
    )


def gradients(model: Any, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(output, torch.linspace(-1, 1, output.numel()))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model: Any, shared: Tensor, apart: Tensor) -> None:
    assert torch.allclose(shared, apart, atol=1e-5)
    expected = gradients(model, apart)
    for name, gradient in gradients(model, shared).items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_scores_of_pairs(ranks: Ranks, window: int | None, recompute: str) -> None:
    from offline_align.config.sections import Recompute
    from offline_align.model.build import build_model

    section = replace(MODEL, sliding_window=window)
    model = build_model("reward_model", section, ParallelSection(), ranks.device, False, Recompute(recompute))
    bins = [PairSource(pairs(), share).collate(range(len(PAIRS)), 8) for share in (True, False)]
    saved = 40 + 16 + 70 + ALIKE
    assert bins[1].tokens.numel() - bins[0].tokens.numel() >= saved - 8
    assert_same(model, *(model(b)[: 2 * len(PAIRS)] for b in bins))


def test_likelihoods_of_answers_to_one_prompt(ranks: Ranks) -> None:
    from offline_align.model.build import build_model

    model = build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=False)
    draw = np.random.Generator(np.random.PCG64(2))
    prompt = draw.integers(0, 90, 25).tolist()
    ids = [prompt + draw.integers(0, 90, n).tolist() for n in (1, 7, 7, 13)]
    bins = [SampleSource(rows(ids, [25] * 4), share).collate(range(4), 1) for share in (True, False)]
    assert bins[0].tokens.numel() == bins[1].tokens.numel() - 75
    assert_same(model, *(model(b) for b in bins))


def test_likelihoods_of_both_answers_of_a_pair(ranks: Ranks) -> None:
    """A pair's bin gives a policy the same likelihoods and gradients as its answers as samples."""
    from offline_align.model.build import build_model

    model = build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=False)
    draw = np.random.Generator(np.random.PCG64(3))
    prompts = [draw.integers(0, 90, n).tolist() for n in (25, 18)]
    answers = [draw.integers(0, 90, n).tolist() for n in (1, 7, 13, 5)]
    ids = [prompts[i // 2] + answer for i, answer in enumerate(answers)]
    starts = [25, 25, 18, 18]
    chosen, rejected = (rows(ids[k::2], starts[k::2]) for k in (0, 1))
    both = TokenizedPairs(chosen, rejected, np.zeros(2, np.float32), ["a", "b"], {})
    for share in (True, False):
        samples = model(SampleSource(rows(ids, starts)).collate(range(4), 1))
        assert samples.numel() == sum(map(len, answers))
        assert_same(model, model(PairSource(both, share, with_targets=True).collate(range(2), 1)), samples)


def test_scores_without_gradients_spare_the_mask(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, answers to a shared prompt use products, and other rows torch's kernel."""
    from offline_align.model.attention_products import attend_by_products
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=False)
    called = []

    def watched(*arguments: Any) -> Tensor:
        called.append(arguments)
        return attend_by_products(*arguments)

    monkeypatch.setattr("offline_align.model.attention.attend_by_products", watched)
    with torch.inference_mode():
        shared = model(PairSource(pairs(), True).collate(range(len(PAIRS)), 8))[: 2 * len(PAIRS)]
        assert len(called) == MODEL.num_layers
        apart = model(PairSource(pairs(), False).collate(range(len(PAIRS)), 8))[: 2 * len(PAIRS)]
        assert len(called) == MODEL.num_layers
    assert torch.allclose(shared, apart, atol=1e-5)


def test_the_same_bits_in_every_run(ranks: Ranks) -> None:
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=False)
    batch = PairSource(pairs(), True).collate(range(len(PAIRS)), 1)
    first, second = (gradients(model, model(batch)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_copy_for_a_device_has_all_its_parts() -> None:
    batch = PairSource(pairs(), True).collate(range(len(PAIRS)), 1)
    moved = batch._each(Tensor.clone)
    assert batch.shared_keys is not None
    assert moved.shared_keys is not None
    assert moved.shared_keys is not batch.shared_keys
    for name, tensor in vars(batch.shared_keys).items():
        assert torch.equal(tensor, getattr(moved.shared_keys, name)), name
