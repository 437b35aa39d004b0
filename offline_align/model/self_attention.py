"""Self-attention of a layer: projection to rotated heads, attention, and output projection.

Shape legend: T tokens of the bin, C hidden width, H query heads, G key/value heads of this rank, D width of a head.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from offline_align.model.attention import Segments
from offline_align.model.backend import has_kernels
from offline_align.model.rotary import rotate

_Heads = tuple[Tensor, Tensor, Tensor]


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """megatron's self-attention with a forward pass for packed rows, as training and scoring need it.

    On CUDA, one kernel splits the projection into heads and rotates them, and one kernel computes the
    gradient. If queries and keys are normalised, or if ranks share a key head, megatron splits the
    projection, and queries and keys are rotated separately.
    """

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedSeqParams | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return [T, 1, C] from [T, 1, C], and the bias, which is None.

        Under sequence parallelism, input and output are this rank's slices.
        """
        assert isinstance(packed_seq_params, Segments), "every batch of this project is packed"
        heads = self._rotated_heads(hidden_states, packed_seq_params)
        recomputes = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputes else self.core_attention
        found = attend(*heads, None, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params)
        out, bias = self.linear_proj(found.to(hidden_states.dtype))
        return out, bias

    def _rotated_heads(self, hidden: Tensor, segments: Segments) -> _Heads:
        """Return rotated query [T, H, D] and key [T, G, D], and value [T, G, D], in the dtype of attention."""
        assert segments.rotary is not None
        cosine, sine = segments.rotary
        groups = self.num_query_groups_per_partition
        is_plain = self.q_layernorm is None and self.k_layernorm is None
        if is_plain and has_kernels(hidden) and self.config.num_query_groups >= self.world_size:
            mixed, _ = self.linear_qkv(hidden)
            split: _Heads = _SplitHeads.apply(mixed.squeeze(1), cosine, sine, groups)  # type: ignore[no-untyped-call]
            return split
        query, key, value = (t.squeeze(1).to(cosine.dtype) for t in self.get_query_key_value_tensors(hidden, None))
        return rotate(query, cosine, sine), rotate(key, cosine, sine), value


class _SplitHeads(torch.autograd.Function):
    """Splits and rotates heads. Its backward pass is the inverse rotation, so only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int) -> _Heads:
        from offline_align.model import kernels

        ctx.save_for_backward(cosine, sine)
        heads: _Heads = kernels.split_heads(mixed, cosine, sine, groups)
        return heads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from offline_align.model import kernels

        return kernels.join_heads(*grads, *ctx.saved_tensors), None, None, None
