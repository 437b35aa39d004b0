"""Attention over packed rows, without Transformer Engine.

Shape legend: T tokens of the bin on this rank, K keys that they can attend to, H query heads of this
rank, G key/value heads of this rank, D width of a head, L queries of a segment, P keys of a segment.
Megatron's hidden states are sequence first: [T, 1, ...].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from offline_align.data.batch import AttentionSlice, PackedBatch, SharedKeys
from offline_align.model.attention_products import LONGEST_ROW, attend_by_products

# With "thd", megatron would reshape the tensors. Here the layout stays sequence first, and only this
# module reads the boundaries of the segments.
PACKED_FORMAT = "sbhd"


@dataclass
class Segments(PackedSeqParams):  # type: ignore[misc]
    """megatron's description of a packed bin, extended by rotary angles and key ranges."""

    slices: tuple[AttentionSlice, ...] = ()
    """Consecutive parts of this rank's queries with the keys that each attends to."""
    shared_keys: SharedKeys | None = None
    """Keys of earlier rows (shared prompts) that rows attend to; None if there are none."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosine and sine of each token: [T, 1, D / 2]."""
    read: Tensor | None = None
    """Positions whose hidden states the head reads; None if it reads the whole sequence."""

    @classmethod
    def of(cls, batch: PackedBatch, rotary: tuple[Tensor, Tensor], read: Tensor | None) -> "Segments":
        """Return the segments of `batch`; the head reads the positions `read`, or all if it is None."""
        whole = AttentionSlice(
            (0, batch.tokens.size(1)), batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen
        )
        return cls(
            qkv_format=PACKED_FORMAT,
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            slices=batch.slices or (whole,),
            shared_keys=batch.shared_keys,
            rotary=rotary,
            read=read,
        )

    @cached_property
    def lengths(self) -> list[tuple[list[int], list[int]]]:
        """Return the numbers of queries and of keys of each segment, slice by slice, for attention by rows."""
        return [(s.cu_seqlens_q.diff().tolist(), s.cu_seqlens_k.diff().tolist()) for s in self.slices]


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a model of `dtype` computes attention and rotary angles.

    On the CPU, a bf16 model uses fp32: the backward pass of torch's fused kernel takes two to three
    times as long in bf16 there (docs/benchmarks.md).
    """
    return torch.float32 if dtype is torch.bfloat16 and device.type == "cpu" else dtype


class PackedAttention(nn.Module):
    """Causal attention inside each segment of a bin, without Transformer Engine.

    There are three implementations:

    - torch's variable-length flash attention, on CUDA;
    - one fused call per row, on the CPU, and on CUDA in fp32 or if the flash kernel does not support
      the head width;
    - explicit batched products (`attention_products`), on the CPU for short rows without a sliding
      window, when training and when answers share a prompt.

    Under context parallelism, each rank gathers keys and values of the whole bin and computes attention
    for its own queries.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or config.softmax_scale or config.kv_channels**-0.5
        window = config.window_size
        self.window = window[0] + 1 if window else None
        self.context_size = config.context_parallel_size

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
        """Return [T, 1, H * D] from query [T, H, D] and key, value [T, G, D]."""
        assert isinstance(packed_seq_params, Segments), "every batch of this project is packed"
        if self.context_size > 1:
            key, value = _gather_context(torch.stack((key, value), dim=1)).unbind(1)
        if packed_seq_params.shared_keys is not None:
            key, value = (_expand_shared_keys(t, packed_seq_params.shared_keys) for t in (key, value))
        attend = self._attend_by_kernel if _kernel_supports(query) else self._attend_by_row
        return attend(query, key, value, packed_seq_params).flatten(1).unsqueeze(1)

    def _attend_by_kernel(self, query: Tensor, key: Tensor, value: Tensor, packed: Segments) -> Tensor:
        slices = packed.slices
        queries = query.chunk(len(slices)) if len(slices) > 1 else (query,)
        parts = [self._attend_slice(q, key, value, s) for q, s in zip(queries, slices, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_slice(self, query: Tensor, key: Tensor, value: Tensor, part: AttentionSlice) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        first, last = part.key_range
        key, value = key[first:last], value[first:last]
        # torch 2.11 has no parameter `enable_gqa` and always supports grouped queries.
        is_grouped = query.size(1) != key.size(1)
        groups: dict[str, Any] = {"enable_gqa": True} if is_grouped and _accepts_enable_gqa(varlen_attn) else {}
        # The causal mask of this kernel aligns the last query with the last key, as slices of a row need.
        out = varlen_attn(
            query,
            key,
            value,
            part.cu_seqlens_q,
            part.cu_seqlens_k,
            part.max_seqlen_q,
            part.max_seqlen_k,
            scale=self.scale,
            window_size=(-1 if self.window is None else self.window - 1, 0),
            **groups,
        )
        assert isinstance(out, Tensor)
        return out

    def _attend_by_row(self, query: Tensor, key: Tensor, value: Tensor, packed: Segments) -> Tensor:
        parts = []
        queries = query.chunk(len(packed.slices))
        by_products = query.requires_grad or packed.shared_keys is not None
        by_products = by_products and not query.is_cuda and self.window is None
        for q, part, lengths in zip(queries, packed.slices, packed.lengths, strict=True):
            first, last = part.key_range
            if by_products and part.max_seqlen_k <= LONGEST_ROW:
                parts.append(attend_by_products(q, key[first:last], value[first:last], lengths, self.scale))
            else:
                parts.append(self._attend_by_segment(q, key[first:last], value[first:last], lengths))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_by_segment(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[list[int], list[int]]
    ) -> Tensor:
        # The backward pass of `torch.split` is one concatenation. That of indexing would allocate a
        # zero-filled tensor of the size of the bin for each segment.
        split = zip(
            *(torch.split(t, n) for t, n in zip((query, key, value), (*lengths, lengths[1]), strict=True)), strict=True
        )
        return torch.cat([self._attend_segment(*(t.transpose(0, 1)[None] for t in segment)) for segment in split])

    def _attend_segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [L, H, D] from query [1, H, L, D] and key, value [1, G, P, D].

        The queries are the last L positions of the segment.
        """
        length, seen = query.size(2), key.size(2)
        mask = None
        if length < seen or (self.window is not None and length > self.window):
            mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
            mask = mask if self.window is None else mask.triu(seen - length + 1 - self.window)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out[0].transpose(0, 1)


def _kernel_supports(query: Tensor) -> bool:
    """Return whether torch's variable-length kernel supports device, dtype and head width of `query`."""
    return query.is_cuda and query.dtype is not torch.float32 and query.size(-1) % 8 == 0 and query.size(-1) <= 256


@cache
def _accepts_enable_gqa(kernel: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(kernel).parameters


def _expand_shared_keys(keys: Tensor, shared: SharedKeys) -> Tensor:
    """Return the keys [K, ...] of all rows, with shared ones repeated, from those of the bin [T, ...]."""
    out: Tensor = _ExpandSharedKeys.apply(keys, shared)  # type: ignore[no-untyped-call]
    return out


class _ExpandSharedKeys(torch.autograd.Function):
    """Repeats shared keys. The backward pass gathers gradients and adds up only those of shared keys.

    On a CPU, the sums are the same to the bit in every run. A GPU adds the gradients of three or more
    rows in any order, as the backward pass of its attention does too.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, shared: SharedKeys) -> Tensor:
        ctx.shared = shared
        return keys.index_select(0, shared.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shared: SharedKeys = ctx.shared
        own = grad.index_select(0, shared.own)
        return own.index_add_(0, shared.again_index, grad.index_select(0, shared.again)), None


def _gather_context(share: Tensor) -> Tensor:
    """Gather the whole bin [K, ...] in order from the two slices [T, ...] of every rank.

    The backward pass sums the gradients over the ranks.
    """
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(share, group=group)
    # Rank r holds slice r and slice 2c - 1 - r.
    early, late = gathered.unflatten(0, (group.size(), 2, -1)).unbind(1)
    return torch.cat((early, late.flip(0))).flatten(0, 1)
