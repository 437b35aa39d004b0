"""Layers of Transformer Engine: norms fused into projections, and cuDNN's attention over packed rows.

This module is imported only if Transformer Engine is installed. Heads and checkpoints are the same as
with the torch backend.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from offline_align.config.sections import ModelSection
from offline_align.model.attention import PackedAttention, Segments
from offline_align.model.layers import layer_specs
from offline_align.model.self_attention import PackedSelfAttention

logger = logging.getLogger(__name__)

# Beginning of Transformer Engine's error if no kernel supports its input.
_NO_KERNEL = "No dot product attention backend"
_refusals: list[str] = []
"""The error that Transformer Engine raised, once it has; it is the same for every layer."""


class TransformerEngineAttention(TEDotProductAttention):  # type: ignore[misc]
    """Transformer Engine's attention inside each segment of a bin.

    The torch backend's attention is used for bins with shared prompts, and for all bins if cuDNN does
    not support the input. Transformer Engine's own fallback would pad every row to the longest one and
    save all scores.
    Shape legend: T tokens of the bin, H query heads, G key/value heads of this rank, D width of a head.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self._torch_attention = PackedAttention(config, softmax_scale=named.get("softmax_scale"))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Return [T, 1, H * D] from query [T, H, D] and key, value [T, G, D]."""
        assert isinstance(packed_seq_params, Segments), "every batch of this project is packed"
        if packed_seq_params.shared_keys is None and not _refusals:
            try:
                out: Tensor = super().forward(
                    query,
                    key,
                    value,
                    None,
                    attn_mask_type,
                    packed_seq_params=_packed(packed_seq_params),
                    num_splits=num_splits,
                )
                return out.reshape(out.size(0), 1, -1)
            except ValueError as error:
                if _NO_KERNEL not in str(error):
                    raise
                _refusals.append(str(error))
                logger.warning("Transformer Engine has no attention for packed rows here; using torch's. %s", error)
        found: Tensor = self._torch_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        return found


def _packed(segments: Segments) -> PackedSeqParams:
    """Return the segments in Transformer Engine's format: tokens first, no batch dimension."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segments.cu_seqlens_q,
        cu_seqlens_kv=segments.cu_seqlens_kv,
        max_seqlen_q=segments.max_seqlen_q,
        max_seqlen_kv=segments.max_seqlen_kv,
    )


def transformer_engine_block_spec(model: ModelSection, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Return megatron's Transformer Engine layers with attention over the segments of a bin.

    The torch backend's attention is used in two cases. Under context parallelism, Transformer Engine's
    needs every row padded to a multiple of twice the group's size. On GPUs before Hopper, cuDNN does not
    support packed rows, and Transformer Engine would pad all rows to the longest one.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_layernorm)
    attention = spec.submodules.self_attention
    supports_packed_rows = torch.cuda.get_device_capability() >= (9, 0)
    use_own = config.context_parallel_size == 1 and supports_packed_rows
    core = TransformerEngineAttention if use_own else PackedAttention
    inner = replace(attention.submodules, core_attention=core)
    layer = replace(
        spec.submodules,
        self_attention=ModuleSpec(module=PackedSelfAttention, params=attention.params, submodules=inner),
    )
    return TransformerBlockSubmodules(layer_specs=layer_specs(layer, config.num_layers), layer_norm=TENorm)
