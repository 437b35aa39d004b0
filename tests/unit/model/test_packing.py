"""Packed rows do not attend to each other: logits, scores and gradients equal those of each row by itself."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from offline_align.config.sections import ModelSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import Ranks, session

MODEL = ModelSection(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=90
)
LENGTHS = [3, 17, 9, 16, 2, 40, 41, 5]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.fixture(scope="module")
def source() -> SampleSource:
    ids = np.random.Generator(np.random.PCG64(1)).integers(0, 90, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    starts, weights = np.ones(len(LENGTHS), np.int32), np.linspace(0.5, 2, len(LENGTHS)).astype(np.float32)
    return SampleSource(TokenizedRows(ids, offsets, starts, weights, [str(n) for n in LENGTHS], {}, 0))


@pytest.mark.parametrize("window", [None, 8])
def test_logits_of_packed_rows_are_those_of_each_row_alone(
    ranks: Ranks, source: SampleSource, window: int | None
) -> None:
    from dataclasses import replace

    from offline_align.model.build import build_model
    from offline_align.model.heads import Policy

    model = build_model("policy", replace(MODEL, sliding_window=window), ParallelSection(), ranks.device, bf16=False)
    assert isinstance(model, Policy)
    batch = source.collate(range(len(LENGTHS)), pad_to_multiple=16)
    with torch.no_grad():
        packed = model.logits(batch)
        for i, length in enumerate(LENGTHS):
            start = int(batch.cu_seqlens[i])
            alone = model.logits(source.collate([i], pad_to_multiple=1))
            assert torch.allclose(packed[start : start + length], alone, atol=1e-5)


def test_scores_and_gradients_do_not_depend_on_packing(ranks: Ranks, source: SampleSource) -> None:
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=False)
    packed = model(source.collate(range(len(LENGTHS)), pad_to_multiple=1))
    packed.sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [model(source.collate([i], pad_to_multiple=1)) for i in range(len(LENGTHS))]
    torch.cat(alone).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, together[name], atol=1e-4), name


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_a_long_target_list_in_pieces_is_the_same(
    ranks: Ranks, source: SampleSource, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    from offline_align.model import vocabulary
    from offline_align.model.build import build_model

    model = build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=False)
    batch = source.collate(range(len(LENGTHS)), pad_to_multiple=1)
    whole = model(batch)
    whole.sum().backward()
    gradient = next(model.parameters()).grad.clone()
    model.zero_grad()
    monkeypatch.setattr(vocabulary, "LOGITS_PIECE_BYTES", {"cpu": 4 * 128 * 10})
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT_BYTES", kept_bytes)
    chunked = model(batch)
    chunked.sum().backward()
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert torch.allclose(next(model.parameters()).grad, gradient, atol=1e-5)


def test_bins_with_long_rows_train_alike(ranks: Ranks, source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bin uses attention by products only if all of its rows are short; the results are the same."""
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=False)
    batch = source.collate(range(len(LENGTHS)), pad_to_multiple=1)
    found = []
    for longest in (max(LENGTHS), max(LENGTHS) - 1):
        monkeypatch.setattr("offline_align.model.attention.LONGEST_ROW", longest)
        model.zero_grad()
        scores = model(batch)
        scores.sum().backward()
        found.append([scores, *(p.grad for p in model.parameters() if p.grad is not None)])
    for short, long in zip(*found, strict=True):
        assert torch.allclose(short, long, atol=1e-5)


def test_the_reward_head_stays_fp32_in_a_bf16_model(ranks: Ranks, source: SampleSource) -> None:
    from offline_align.model.build import build_model

    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=True)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("reward_head.weight") is torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert model(source.collate([1, 2], pad_to_multiple=1)).dtype is torch.float32
