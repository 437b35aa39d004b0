"""Attention over packed rows and the norm that the torch backend puts around it.

Shape legend: T tokens of the bin, H query heads of this rank, G key/value heads of this rank, D width of a head,
L tokens of a segment. Megatron hidden states are sequence first: [T, 1, ...].
"""

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


class Segments(PackedSeqParams):  # type: ignore[misc]
    """megatron's description of a bin, with the lengths that the CPU attention works by."""

    @cached_property
    def lengths(self) -> list[int]:
        """Return the tokens of each segment."""
        lengths: list[int] = self.cu_seqlens_q.diff().tolist()
        return lengths


class PackedAttention(nn.Module):
    """Causal scaled dot-product attention inside each segment of a bin, without Transformer Engine.

    CUDA uses torch's variable-length flash attention, the CPU one fused call for each segment.
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
        # Splitting makes views, and its gradient is one concatenation; slices would each fill a whole bin with zeros.
        parts = zip(*(torch.split(t, packed.lengths) for t in (query, key, value)), strict=True)
        return torch.cat([self._attend_segment(*(t.transpose(0, 1)[None] for t in part)) for part in parts])

    def _attend_segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [L, H, D] from query [1, H, L, D] and key, value [1, G, L, D]."""
        length = query.size(2)
        mask = None
        if self.window is not None and length > self.window:
            ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - self.window)
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
