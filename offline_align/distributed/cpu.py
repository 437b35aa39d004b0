"""Run megatron-core on CPU by patching torch and megatron globals.

megatron-core 0.19 calls CUDA by name in its schedules, optimizer and checkpoints. With the patches
below the same code, collectives included, runs on CPU tensors over gloo, so a laptop and CI
exercise the production path. Only `enable()` applies the patches, never an import;
`distributed.setup` calls it if the device is the CPU.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "rand",
    "randn",
    "arange",
    "empty_like",
    "zeros_like",
)
_CPU = torch.device("cpu")
_enabled = False


class _Stream:
    """Stand-in for a CUDA stream: work on the CPU is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


def _nothing(*_: Any, **__: Any) -> None:
    return None


@contextlib.contextmanager
def _no_stream(_: Any) -> Iterator[None]:
    yield


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `factory` with CUDA devices in its arguments replaced by the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _type_name(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Tensor.type` to return the CUDA type names that megatron's optimizer expects."""

    @functools.wraps(tensor_type)
    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return named


def enable() -> None:
    """Make megatron-core work on CPU tensors in this process; a second call does nothing."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    # `with torch.device(...)` recognises factories by identity, from a list made at its first use.
    # Make that list before the factories are replaced; otherwise models that other libraries load
    # under it keep uninitialised buffers.
    with torch.device("meta"):
        torch.empty(0)
    _keep_freed_memory()
    _limit_kernel_cache()
    _skip_compilation()
    _patch_device()
    _skip_single_rank_collectives()
    _patch_random_state()


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors instead of returning it to the system.

    Otherwise a tensor of some megabytes is mapped and unmapped at every use. Touching its fresh
    pages costs more than the arithmetic on them: on virtual machines several times the whole step.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # constants of <malloc.h>
    libc = ctypes.CDLL(None)
    # Other C libraries have no such setting. It affects speed only.
    with contextlib.suppress(AttributeError):
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)


def _limit_kernel_cache() -> None:
    """Limit the kernels that oneDNN caches for bf16 products.

    oneDNN generates one kernel a shape and keeps 1,024 of them, at a MiB each. Bins differ in
    length, so only kernels of the current bin are used again, and a model needs some 20 of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def _skip_compilation() -> None:
    """Disable `torch.compile` for megatron's fused functions and the hooks of torch's optimizers.

    megatron decorates element-wise functions with `torch.compile` at import, which loads the whole
    compiler. That costs a CPU process more than it can gain. torch's optimizers load the compiler
    as well, only to exclude their own methods from compilation.
    """
    torch_module: Any = torch
    torch_module.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        method: Any = getattr(torch.optim.Optimizer, name)
        setattr(torch.optim.Optimizer, name, getattr(method, "__wrapped__", method))


def _skip_single_rank_collectives() -> None:
    """Skip in-place collectives in groups of one rank.

    The distributed optimizer reduces gradients and gathers weights in place. In a group of one,
    gloo still copies both through a buffer of their size: a twentieth of a step of a small model.
    """
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, _unless_alone(getattr(dist, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        in_place = output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
        if in_place and dist.get_world_size(kwargs.get("group")) == 1:
            return None
        return collective(output, given, *args, **kwargs)

    return call


def _patch_device() -> None:
    cuda: Any = torch.cuda
    # On a machine with a GPU, other libraries would otherwise query it with the CPU device below.
    cuda.is_available = lambda: False
    cuda.current_device = lambda: _CPU
    cuda.synchronize = cuda.empty_cache = _nothing
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = _Stream
    cuda.current_stream = lambda *_: _Stream()
    cuda.stream = _no_stream
    tensor: Any = torch.Tensor
    tensor.record_stream = _nothing
    tensor.cuda = lambda self, *_, **__: self
    tensor.type = _type_name(tensor.type)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    tracker: Any = megatron_random
    tracker._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
