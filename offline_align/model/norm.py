"""The norm of the torch backend."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm that supports sequence parallelism, unlike megatron's wrapper of torch's norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank has a slice of the sequence, so megatron must sum the gradients over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if not config.use_cpu_initialization:
            self.to(torch.cuda.current_device())

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of shape [..., hidden] divided by its root mean square, times the weight."""
        if x.is_cuda:
            return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `F.rms_norm` over the last dimension of `x`, with a faster backward pass on the CPU."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass of a third of the operations that torch uses on the CPU.

    There torch composes the norm of single operations, each a pass over memory. The forward pass here
    uses the same operations and gives the same bits, in fp32 if `x` is in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = _wide(x)
        inverse = full.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(full, inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dtype, (x, full_weight, grad) = x.dtype, map(_wide, (x, weight, grad))
        product = (grad * x).flatten(0, -2)
        weight_grad = inverse.flatten() @ product
        # The norm does not depend on the length of a row, so this removes the part of the gradient
        # along the row.
        along = (product @ full_weight).view_as(inverse).mul_(inverse**3).div_(x.size(-1))
        x_grad = torch.mul(grad, full_weight).mul_(inverse).addcmul_(x, along, value=-1)
        return x_grad.to(dtype), weight_grad.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or unchanged if it has at least that precision."""
    return x.float() if x.element_size() < 4 else x
