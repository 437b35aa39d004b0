"""Gradients of weight matrices are added up where they are kept, by the product that makes them.

megatron keeps the gradient of a weight, summed over micro-batches, in `main_grad`. Left to autograd, a backward pass
writes the gradient of its micro-batch, in the model's precision, and a hook reads it again to add it. Here the product
adds to `main_grad` itself: nothing of a weight's size is written between, and nothing is rounded to bf16 where the sum
is in fp32.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from torch import Tensor, nn


def add_in_place(model: nn.Module) -> None:
    """Let the projections of `model` add to the `main_grad` that their weights have got, of whichever backend.

    megatron's local layers ask a compiled part of apex for the products; they get `add_product`.
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
    """Add `out_grad.T @ inputs` to `total`: [M, C] from [N, M] and [N, C], which may be of a narrower type."""
    if total.dtype is inputs.dtype:
        total.addmm_(out_grad.t(), inputs)
    elif total.dtype is torch.float32 and total.is_cuda and _sums_in_fp32(total.device):
        torch.addmm(total, out_grad.t(), inputs, out_dtype=torch.float32, out=total)
    else:
        total.add_(out_grad.t() @ inputs)


@cache
def _sums_in_fp32(device: torch.device) -> bool:
    """Whether products of bf16 can be added to fp32 on `device`: a kernel for it came to torch late."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def added(weight: Tensor) -> Tensor:
    """Tell megatron that the gradient of `weight` has been added, and return what autograd takes in its place.

    Nobody reads its values.
    """
    marked: Any = weight
    marked.grad_added_to_main_grad = True
    return torch.empty_like(weight)
