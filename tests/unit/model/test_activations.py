"""The estimate of activation memory against the tensors that autograd saves."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from offline_align.config.sections import Device, ModelSection, ParallelSection, Recompute, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import Ranks, session
from offline_align.estimate.sizes import ParallelSizes, model_sizes, training_memory

TOKENS = 256


def kept_bytes(ranks: Ranks, model: ModelSection) -> int:
    """Return the bytes that a forward pass over one row saves for the backward pass, without weights."""
    from offline_align.model.build import build_model

    built = build_model("policy", model, ParallelSection(), ranks.device, False, Recompute.none)
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    row = TokenizedRows(
        ids=np.arange(TOKENS, dtype=np.int32) % 100,
        offsets=np.array([0, TOKENS]),
        target_start=np.array([TOKENS // 2], dtype=np.int32),
        weight=np.ones(1, dtype=np.float32),
        row_ids=["r"],
        dropped={},
        truncated=0,
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = built(SampleSource(row).collate([0], 1))
    assert output.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights)


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_parameters_that_the_plan_counts(
    tmp_path: Path, kind: Literal["policy", "reward_model"], tied: bool
) -> None:
    from offline_align.model.build import build_model

    model = ModelSection(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        vocab_size=100,
        share_embeddings_and_output_weights=tied,
    )
    with session(ParallelSection(), RunSection(dir=str(tmp_path), device=Device.cpu)) as ranks:
        built = build_model(kind, model, ParallelSection(), ranks.device, False, Recompute.none)
    planned = model_sizes(model, 100, scalar_head=kind == "reward_model").parameters
    assert sum(parameter.numel() for parameter in built.parameters()) == planned


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize(("hidden", "ffn", "heads", "groups"), [(64, 256, 4, 4), (128, 256, 8, 2)])
def test_a_layer_keeps_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: int, ffn: int, heads: int, groups: int, by_products: bool
) -> None:
    """The estimate is for GPUs, whose attention saves no probabilities; on the CPU, short rows save theirs too."""
    if not by_products:
        monkeypatch.setattr("offline_align.model.attention.LONGEST_ROW", TOKENS - 1)

    def model(layers: int) -> ModelSection:
        return ModelSection(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=128,
        )

    def planned(layers: int) -> float:
        sizes = model_sizes(model(layers), 128)
        ranks = ParallelSizes(1, 1, 1)
        return training_memory(sizes, ParallelSection(), ranks, TOKENS, False, "none").activations

    with session(ParallelSection(), RunSection(dir=str(tmp_path), device=Device.cpu)) as ranks:
        # The difference of two layers cancels embedding and head.
        kept = kept_bytes(ranks, model(4)) - kept_bytes(ranks, model(2))
    # torch's norm on the CPU saves 2 copies of 4 bytes per hidden value, which the fused norm on CUDA
    # does not.
    extra = 2 * 4 * TOKENS * 2 * hidden
    if by_products:
        # Queries in blocks of 128, times the keys that a block attends to.
        probabilities = 2 * 4 * heads * (128 * 128 + 128 * 256)
        assert probabilities < kept - extra <= probabilities + planned(4) - planned(2)
    else:
        assert kept - extra == pytest.approx(planned(4) - planned(2), rel=0.15)
