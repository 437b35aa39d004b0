"""Build megatron-core's optimizer and data parallel wrapper, and compute learning rates."""

import math
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.utils import local_multi_tensor_applier
from torch import Tensor, nn

from offline_align.config.sections import DecayStyle, OptimSection, ParallelSection
from offline_align.model.weight_gradients import add_in_place
from offline_align.train.adam import Adam


def learning_rate(step: int, optim: OptimSection, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    The linear warm-up reaches the peak at step `lr_warmup_steps - 1`. The decay runs over the remaining
    steps. Neither the first nor the last step has a rate of zero, which would waste it.
    """
    if step < optim.lr_warmup_steps:
        return optim.lr * (step + 1) / optim.lr_warmup_steps
    if optim.lr_decay_style is DecayStyle.constant:
        return optim.lr
    decay_steps = (optim.lr_decay_steps or total_steps) - optim.lr_warmup_steps
    progress = min(1.0, (step - optim.lr_warmup_steps) / max(1, decay_steps))
    remaining = 1.0 - progress
    if optim.lr_decay_style is DecayStyle.cosine:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining


def wrap_model(model: nn.Module, parallel: ParallelSection, on_cuda: bool) -> DistributedDataParallel:
    """Return `model` in megatron's data parallel wrapper.

    Communication overlaps computation only on CUDA and with more than one data parallel rank.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce and on_cuda and _has_replicas(),
        overlap_param_gather=_overlaps_param_gather(parallel, on_cuda),
    )
    wrapped = DistributedDataParallel(model.config, config, model)
    add_in_place(model)
    return wrapped


def _overlaps_param_gather(parallel: ParallelSection, on_cuda: bool) -> bool:
    wanted = parallel.overlap_param_gather and parallel.overlap_grad_reduce
    return wanted and parallel.use_distributed_optimizer and on_cuda and _has_replicas()


def _has_replicas() -> bool:
    """Return whether data parallel ranks exchange anything; for a single rank overlap is only overhead."""
    size: int = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return size > 1


def build_optimizer(
    model: DistributedDataParallel, optim: OptimSection, parallel: ParallelSection, bf16: bool, on_cuda: bool
) -> MegatronOptimizer:
    """Return megatron's AdamW with fp32 main weights for `model`.

    `set_rates` must set its learning rate and weight decay before each update.
    """
    _register_own_adam(on_cuda)
    _register_own_norm()
    if optim.use_precision_aware_optimizer:
        from offline_align.train.transformer_engine_adam import TransformerEngineAdam

        core: Any = megatron_optimizer
        core.Adam = TransformerEngineAdam
    config = OptimizerConfig(
        optimizer="adam",
        lr=_NOMINAL_RATE,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=_overlaps_param_gather(parallel, on_cuda),
        **(_precision_aware_fields(parallel) if optim.use_precision_aware_optimizer else {}),
    )
    overrides = get_standard_config_overrides(config)
    if bf16:
        overrides[_FP32_PARAMETERS] = {"max_lr": _NOMINAL_RATE}
    return get_megatron_optimizer(config, [model], config_overrides=overrides, use_gloo_process_groups=False)


def set_rates(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set learning rate and weight decay of the next update in every parameter group.

    Weight decay applies to matrices, and not to biases and other vectors such as the weights of norms.
    This is megatron's rule (`get_standard_config_overrides`). Its parameter groups store it as a
    factor, `wd_mult`, which only megatron's scheduler reads. The decay is set before every update
    because loading a checkpoint restores the decay of the time when it was saved.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]


def _precision_aware_fields(parallel: ParallelSection) -> dict[str, Any]:
    """Return megatron's fields for moments and gradients in bf16.

    Of the main weights, only the 16 bits that the bf16 weights lack are stored.
    """
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "main_grads_dtype": torch.float32 if parallel.grad_reduce_in_fp32 else torch.bfloat16,
    }


# Learning rate with which parameter groups are built. Every step sets its own rate. megatron matches
# the groups of a checkpoint by the rate they were built with, so it is the same for all runs: a run
# may then resume at another rate.
_NOMINAL_RATE = 1.0
# megatron's distributed optimizer mixes up the states of a group with parameters of two dtypes, so the
# fp32 parameters of a bf16 model get a group of their own. An override creates it; its value, the
# nominal rate, changes nothing.
_FP32_PARAMETERS = ParamKey(
    predicate=ParamPredicate(name="fp32 in a bf16 model", fn=lambda parameter: parameter.dtype is torch.float32)
)


def _l2_norm(_: int, __: Tensor, tensors: list[list[Tensor]], ___: bool) -> tuple[Tensor, None]:
    """Return the norm of all tensors together, [1] in fp32, without synchronising with the device.

    megatron's fallback for apex's kernel reads the norm of every parameter on the host.
    """
    return torch.stack(torch._foreach_norm(tensors[0], 2.0, torch.float32)).norm().view(1), None


def multiply_gradients(optimizer: MegatronOptimizer, factor: float) -> None:
    """Multiply the prepared gradients of `optimizer` by `factor`, in place."""
    # With moments in bf16, megatron stores the gradients in another attribute of the weights.
    name = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    found = (getattr(weight, name, None) for weight in optimizer.get_parameters())
    gradients = [gradient for gradient in found if gradient is not None]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def _register_own_norm() -> None:
    """Make megatron compute gradient norms with `_l2_norm`.

    The kernels of Transformer Engine and apex assume that all gradients have the dtype of the first
    one. If gradients stay in bf16, this is wrong for a scalar head, whose gradients are in fp32.
    """
    norms: Any = clip_grads
    norms.multi_tensor_applier = local_multi_tensor_applier
    norms.l2_norm_impl = _l2_norm
    # If this were set, megatron would return the norm as a tensor.
    norms.multi_tensor_scale_tensor_impl = None


def _register_own_adam(on_cuda: bool) -> None:
    """Make megatron use `Adam` as a fused optimizer if this device has no other one.

    megatron uses the optimizers of Transformer Engine or apex if they are installed, but those have
    kernels for CUDA only.
    """
    core: Any = megatron_optimizer
    sharded: Any = distrib_optimizer
    if on_cuda and not core.USING_PYTORCH_OPTIMIZER:
        return
    core.USING_PYTORCH_OPTIMIZER = False
    core.Adam = Adam
    sharded.HAVE_APEX_OR_TE = True
    sharded.USING_APEX_OPTIMIZER = True
