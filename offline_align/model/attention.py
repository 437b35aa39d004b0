"""Attention over packed rows and the norm that the torch backend puts around it.

Shape legend: T tokens of the bin, H query heads of this rank, G key/value heads of this rank, D width of a head,
S segments of a group and L tokens of its longest. Megatron hidden states are sequence first: [T, 1, ...].
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

# megatron applies its own per-segment loops to "thd"; rotary angles here are gathered by position already, so the
# layout stays sequence first and only this module reads the boundaries.
PACKED_FORMAT = "sbhd"


# Segments of a group differ in length by at most this factor, which bounds the work on padding.
_GROUP_RATIO = 0.7


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of similar length, attended to in one call: causal attention never looks at padding on the right."""

    gather: Tensor
    """[S * L] place in the bin of every token of the padded group; padding repeats the first token."""
    shape: tuple[int, int]
    """S and L."""
    scatter: Tensor
    """[tokens of the group] place of every real token in the padded group."""


class Segments(PackedSeqParams):  # type: ignore[misc]
    """megatron's description of a bin, with the groups that the CPU attention works on."""

    @cached_property
    def groups(self) -> tuple[list[SegmentGroup], Tensor]:
        """Return the groups, and where each token of the bin lies in their concatenated outputs: [T]."""
        bounds = self.cu_seqlens_q.long()
        starts, lengths = bounds[:-1], bounds.diff()
        order = lengths.argsort(descending=True, stable=True)
        groups, places = [], []
        for chosen in _similar(order, lengths):
            longest = int(lengths[chosen[0]])
            offsets = torch.arange(longest)
            real = offsets < lengths[chosen, None]
            padded = torch.where(real, starts[chosen, None] + offsets, starts[chosen[0]])
            scatter = real.flatten().nonzero()[:, 0]
            groups.append(SegmentGroup(padded.flatten(), (len(chosen), longest), scatter))
            places.append(padded.flatten()[scatter])
        return groups, torch.cat(places).argsort()


def _similar(order: Tensor, lengths: Tensor) -> list[Tensor]:
    """Cut segments in order of falling length into groups of similar ones."""
    found, first = [], 0
    values = lengths[order].tolist()
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] < _GROUP_RATIO * values[first]:
            found.append(order[first:i])
            first = i
    return found


class PackedAttention(nn.Module):
    """Causal scaled dot-product attention inside each segment of a bin, without Transformer Engine.

    CUDA uses torch's variable-length flash attention, the CPU one fused call for each group of similar segments.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or config.softmax_scale
        window = config.window_size
        self.window = window[0] + 1 if window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [T, 1, H * D] from query [T, 1, H, D] and key, value [T, 1, G, D]."""
        assert packed_seq_params is not None, "every batch of this project is packed"
        tensors = (query.squeeze(1), key.squeeze(1), value.squeeze(1))
        attend = self._attend_cuda if query.is_cuda else self._attend_cpu
        return attend(*tensors, packed_seq_params).flatten(1).unsqueeze(1)

    def _attend_cuda(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if self.window is None else self.window - 1
        out = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            window_size=(left, 0),
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(out, Tensor)
        return out

    def _attend_cpu(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams) -> Tensor:
        groups, order = packed.groups
        return torch.cat([self._attend_group(query, key, value, g) for g in groups]).index_select(0, order)

    def _attend_group(self, query: Tensor, key: Tensor, value: Tensor, group: SegmentGroup) -> Tensor:
        """Return [tokens of the group, H, D]."""
        segments, length = group.shape
        q, k, v = (
            t.index_select(0, group.gather).view(segments, length, *t.shape[1:]).transpose(1, 2)
            for t in (query, key, value)
        )
        mask = None
        if self.window is not None and length > self.window:
            ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - self.window)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, group.scatter)


class RMSNorm(nn.Module):
    """Root-mean-square norm that works with sequence parallelism, unlike megatron's wrapper of torch's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a slice of the sequence, so megatron must add the ranks' gradients up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if not config.use_cpu_initialization:
            self.to(torch.cuda.current_device())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of shape [..., hidden] divided by its root mean square, times the weight."""
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
