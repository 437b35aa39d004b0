"""SwiGLU in few passes over memory.

It is used on the CPU, and on CUDA if megatron's fused SwiGLU cannot be compiled.
Shape legend: F inner width of this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`silu(gate) * up`, given a projection with both halves side by side."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., F] from [..., 2 F]. Only the input is saved for the backward pass."""
        out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
        return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out
