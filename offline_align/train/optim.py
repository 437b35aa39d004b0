"""megatron-core's optimizer and data parallel wrapper from our sections, and the learning rate of a step."""

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

    Linear warm-up ends at the peak with step `lr_warmup_steps - 1`; the decay then runs over the remaining steps, so
    that neither the first nor the last step is wasted on a rate of zero.
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
    """Return `model` in megatron's data parallel wrapper; overlap needs CUDA streams and somebody to talk to."""
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
    """Whether anything is exchanged: a single rank only pays for the calls."""
    size: int = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return size > 1


def build_optimizer(
    model: DistributedDataParallel, optim: OptimSection, parallel: ParallelSection, bf16: bool, on_cuda: bool
) -> MegatronOptimizer:
    """Return megatron's optimizer over `model`: AdamW with fp32 main weights, whose rates `set_rates` gives."""
    _offer_own_adam(on_cuda)
    _offer_own_norm()
    if optim.use_precision_aware_optimizer:
        from offline_align.train.transformer_engine_adam import TransformerEngineAdam

        lean: Any = megatron_optimizer
        lean.Adam = TransformerEngineAdam
    config = OptimizerConfig(
        optimizer="adam",
        lr=_MARK,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=_overlaps_param_gather(parallel, on_cuda),
        **(_lean_state(parallel) if optim.use_precision_aware_optimizer else {}),
    )
    overrides = get_standard_config_overrides(config)
    if bf16:
        overrides[_FP32_PARAMETERS] = {"max_lr": _MARK}
    return get_megatron_optimizer(config, [model], config_overrides=overrides, use_gloo_process_groups=False)


def set_rates(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set learning rate and weight decay of the next update in every parameter group.

    Matrices have the whole decay; biases and other vectors, such as the weights of norms, have none: megatron's rule
    (`get_standard_config_overrides`). Its groups carry that as a factor, `wd_mult`, which only its own scheduler reads.
    It is set before every update, because a checkpoint also restores the decay that its groups had when it was saved.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]


def _lean_state(parallel: ParallelSection) -> dict[str, Any]:
    """Return megatron's fields for moments and gradients in bf16; main weights are stored as remainders of bf16."""
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "main_grads_dtype": torch.float32 if parallel.grad_reduce_in_fp32 else torch.bfloat16,
    }


# Every step sets its own rate. megatron finds the groups of a checkpoint by the rate that they were made with, so that
# one is the same for all runs: a run may be continued at another rate.
_MARK = 1.0
# megatron's distributed optimizer mixes up the states of a group that holds parameters of two dtypes, so the fp32
# ones of a bf16 model get a group of their own; the rate that marks it is the one they have anyway.
_FP32_PARAMETERS = ParamKey(
    predicate=ParamPredicate(name="fp32 in a bf16 model", fn=lambda parameter: parameter.dtype is torch.float32)
)


def _l2_norm(_: int, __: Tensor, tensors: list[list[Tensor]], ___: bool) -> tuple[Tensor, None]:
    """Return the norm of all tensors together, [1] in fp32, without waiting for any of them.

    megatron's stand-in for apex's reads the norm of every parameter on the host.
    """
    return torch.stack(torch._foreach_norm(tensors[0], 2.0, torch.float32)).norm().view(1), None


def multiply_gradients(optimizer: MegatronOptimizer, factor: float) -> None:
    """Multiply the gradients that are ready for `optimizer` by `factor`, in place."""
    # Where moments are in bf16, gradients wait beside the weights under a name of their own.
    name = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    found = (getattr(weight, name, None) for weight in optimizer.get_parameters())
    gradients = [gradient for gradient in found if gradient is not None]
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


def _offer_own_norm() -> None:
    """Let megatron take the norm of gradients by torch's operations over many tensors.

    Transformer Engine's and apex's take the type of the first gradient for that of all, and where gradients stay in
    bf16 those of a scalar head are in fp32.
    """
    norms: Any = clip_grads
    norms.multi_tensor_applier = local_multi_tensor_applier
    norms.l2_norm_impl = _l2_norm
    # With it megatron would return the norm as a tensor.
    norms.multi_tensor_scale_tensor_impl = None


def _offer_own_adam(on_cuda: bool) -> None:
    """Let megatron use our Adam as if it were a fused one, where there is none for this device.

    Transformer Engine's and apex's, which megatron takes wherever they are installed, have kernels for CUDA only.
    """
    core: Any = megatron_optimizer
    sharded: Any = distrib_optimizer
    if on_cuda and not core.USING_PYTORCH_OPTIMIZER:
        return
    core.USING_PYTORCH_OPTIMIZER = False
    core.Adam = Adam
    sharded.HAVE_APEX_OR_TE = True
    sharded.USING_APEX_OPTIMIZER = True
