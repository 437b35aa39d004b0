"""Rotary position embedding for packed rows, computed from positions instead of a loop over segments."""

from typing import Any

import torch
from torch import Tensor, nn

from offline_align.config.sections import ModelSection


def inverse_frequencies(model: ModelSection) -> tuple[Tensor, float]:
    """Return the rotary frequencies [head width / 2] in fp32, and the factor on cosine and sine.

    Scaled variants (`linear`, `llama3`, `yarn`, ...) are computed by transformers and equal its own to
    the bit.
    """
    head_dim = model.head_width
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
    """Computes cosine and sine of every token of a bin from its position in its segment, once for all layers."""

    inverse_frequencies: Tensor

    def __init__(self, frequencies: Tensor, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        self.factor = factor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine [T, 1, D / 2] for positions [T], computed in fp32 and rounded to `dtype`."""
        angles = torch.outer(positions.float(), self.inverse_frequencies.float())[:, None]
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return queries or keys [T, H, D] with each pair (d, d + D / 2) rotated by the angle of its token."""
    rotated: Tensor = _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """Rotates pairs. Its backward pass is the inverse rotation, so only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(grad, cosine, sine, -1), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=left).addcmul_(second, sine, value=-direction)
    torch.mul(second, cosine, out=right).addcmul_(first, sine, value=direction)
    return out
