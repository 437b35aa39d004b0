"""The calls of CUDA's attention kernel, replaced by a reference with the signatures of two torch versions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_align.data.batch import AttentionSlice
from offline_align.model.attention import PackedAttention, Segments

HEADS, WIDTH = 4, 8


def of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Attend from each query to the keys up to its own position, and at most `window_size[0]` before it.

    Positions are aligned at the end: the last query has the position of the last key.
    """
    key, value = (t.repeat_interleave(query.size(1) // t.size(1), dim=1) for t in (key, value))
    assert window_size[1] == 0 and scale is not None
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    out = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (t[cu_seq_k[i] : cu_seq_k[i + 1]] for t in (key, value))
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (distance < 0) | (distance > window_size[0] if window_size[0] >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)


def of_torch_2_12(
    query: Tensor, key: Tensor, value: Tensor, *boundaries: Any, enable_gqa: bool = False, **named: Any
) -> Tensor:
    assert enable_gqa == (query.size(1) != key.size(1))
    return of_torch_2_11(query, key, value, *boundaries, **named)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_12])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_gives_what_segments_give(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, key_heads: int, window: int | None
) -> None:
    """Compare for whole rows, and for queries of the later part of a row, which attend to all its keys."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    config: Any = SimpleNamespace(
        softmax_scale=WIDTH**-0.5, window_size=(window - 1, 0) if window else None, context_parallel_size=1
    )
    attention = PackedAttention(config)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(20, h, WIDTH, generator=generator) for h in (HEADS, key_heads, key_heads))
    early = AttentionSlice((0, 10), _boundaries(3, 7), _boundaries(3, 7), 7, 7)
    late = AttentionSlice((3, 20), _boundaries(6, 4), _boundaries(13, 4), 6, 13)
    segments = Segments(slices=(early, late))
    found = attention._attend_by_kernel(query, key, value, segments)
    assert torch.allclose(found, attention._attend_by_row(query, key, value, segments), atol=1e-6)


def _boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
