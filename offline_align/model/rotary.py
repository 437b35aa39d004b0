"""Rotary position embedding for packed rows: one gather by position instead of a loop over segments."""

from typing import Any

import torch
from torch import Tensor, nn

from offline_align.config.sections import ModelSection


def inverse_frequencies(model: ModelSection) -> tuple[Tensor, float]:
    """Return the rotary frequencies [head width / 2] in fp32 and the factor on cosine and sine.

    Scaled forms (`linear`, `llama3`, `yarn`, ...) come from transformers, so that they are its own to the bit.
    """
    head_dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    if not model.rope_scaling:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (model.rotary_base**exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={**model.rope_scaling, "rope_theta": model.rotary_base},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[model.rope_scaling["rope_type"]](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


class PackedRotaryEmbedding(nn.Module):
    """Angles of every token of a bin, from its position in its own segment."""

    inverse_frequencies: Tensor

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, position_ids: Tensor, mrope_section: Any = None, cp_group: Any = None) -> Tensor:
        """Return angles [T, 1, 1, D] in fp32 for `position_ids` [1, T]; the other arguments are megatron's."""
        angles = torch.outer(position_ids[0].float(), self.inverse_frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
