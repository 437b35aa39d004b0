"""The norm of the torch backend."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


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
        if x.is_cuda:
            return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `F.rms_norm` does over the last dimension of `x`, on the CPU and with a quicker gradient."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """On the CPU torch makes the norm of single operations, each a pass over memory, and so its gradient.

    The same operations forward, to the bit, in fp32 for `x` in bf16; backward a third of them.
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
        # Of each row: how much the gradient points along it, which the norm takes out.
        along = (product @ full_weight).view_as(inverse).mul_(inverse**3).div_(x.size(-1))
        x_grad = torch.mul(grad, full_weight).mul_(inverse).addcmul_(x, along, value=-1)
        return x_grad.to(dtype), weight_grad.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or as it is where that would be less."""
    return x.float() if x.element_size() < 4 else x
