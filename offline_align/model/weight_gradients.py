"""Fused accumulation of weight gradients: the matrix product adds to `main_grad` directly.

megatron sums the gradients of a weight over micro-batches in `main_grad`. With autograd alone, each
backward pass writes its gradient in the model's precision, and a hook reads it again to add it. Fused
accumulation does not write this intermediate tensor of the weight's size, and does not round it to bf16
if the sum is in fp32.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor, nn


def add_in_place(model: nn.Module) -> None:
    """Make the projections of `model` add to the `main_grad` of their weights, with either backend.

    megatron's own layers call a compiled extension of apex for this. It is replaced by `add_product`.
    """
    products: Any = layers
    products.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_for_megatron, wgrad_gemm_accum_fp16=_for_megatron
    )
    module: Any
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _for_megatron(inputs: Tensor, out_grad: Tensor, total: Tensor) -> None:
    add_product(total, out_grad, inputs)


def add_product(total: Tensor, out_grad: Tensor, inputs: Tensor) -> None:
    """Add `out_grad.T @ inputs` to `total`: [M, C] from [N, M] and [N, C], which may have a narrower dtype."""
    if total.dtype is inputs.dtype:
        total.addmm_(out_grad.t(), inputs)
    elif total.dtype is torch.float32 and total.is_cuda and _sums_in_fp32(total.device):
        torch.addmm(total, out_grad.t(), inputs, out_dtype=torch.float32, out=total)
    else:
        total.add_(out_grad.t() @ inputs)


@cache
def _sums_in_fp32(device: torch.device) -> bool:
    """Return whether `torch.addmm` can add bf16 products to fp32 on `device`; older versions of torch cannot."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def added(weight: Tensor) -> Tensor:
    """Mark the gradient of `weight` as added for megatron, and return a placeholder for autograd.

    The values of the placeholder are uninitialised and never read.
    """
    marked: Any = weight
    marked.grad_added_to_main_grad = True
    return torch.empty_like(weight)
