"""An imagined GPU: torch sees an H100 whose tensors have shapes, types and a device but no values.

The same code runs as on a real GPU, including collectives and streams, for any layout of ranks and
any model size, in seconds. This shows tensors on the wrong device or of the wrong type, the memory
that is allocated at a time, and how often the host waits for a value. It cannot show values, times or
anything inside a kernel.

`environment` returns the variables that a process must be started with. In that process,
`imagined_rank` simulates one of many ranks.
"""

import contextlib
import os
import re
import subprocess
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SOURCE = Path(__file__).with_suffix(".c")
# torch's counter does not know the in-place `addmm_`. Attention is left out, because for packed rows
# the counter reports the cost of one long row.
_PRODUCTS = {product: flop_registry[product] for product in (torch.ops.aten.mm, torch.ops.aten.addmm)}
_PRODUCTS[torch.ops.aten.addmm_] = _PRODUCTS[torch.ops.aten.addmm]
# In inference mode, `item` replaces `_local_scalar_dense`.
_READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
# torch's CUDA allocator rounds sizes up to a multiple of this.
_BLOCK_BYTES = 512


class Unavailable(Exception):
    """This machine cannot imagine a GPU, because it has no C compiler or a torch without CUDA."""


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables that make a process see an imagined GPU.

    Compiles its library into `folder`. Raises Unavailable if the machine lacks a requirement, and
    CalledProcessError if the compilation fails.
    """
    library = folder / "imagined_gpu.so"
    if torch.version.cuda is None:
        raise Unavailable("this torch is built without CUDA")
    headers = [f"-I{path}" for path in _headers()]
    # With the soname of the driver, the loader uses this library for every request for the driver.
    command = ["cc", "-shared", "-fPIC", "-w", *headers, "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
    try:
        subprocess.run(command, input=_source(), text=True, check=True)
    except FileNotFoundError as error:
        raise Unavailable("no C compiler: cc") from error
    return {
        "LD_PRELOAD": str(library),
        "CUDA_VISIBLE_DEVICES": "0",
        # Compiled functions would launch kernels, so megatron's functions run without compilation.
        "TORCHDYNAMO_DISABLE": "1",
        # Expandable segments need the real driver.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    }


def _headers() -> list[Path]:
    """Return the folders of the CUDA headers in torch and Triton, those of torch's version first."""
    packages = Path(torch.__file__).parents[1]
    return [*packages.glob("nvidia/*/include"), packages / "triton" / "backends" / "nvidia" / "include"]


def _source() -> str:
    """Return the C source, with an empty function for each driver function that torch looks up."""
    text = SOURCE.read_text(encoding="utf-8")
    binary = (Path(torch.__file__).parent / "lib" / "libc10_cuda.so").read_bytes()
    names = sorted({name.decode() for name in re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", binary)})
    return text + "".join(f"int {name}(void) DONE\n" for name in names if f"int {name}(" not in text)


class ImaginedGpu(TorchDispatchMode):
    """Counts allocated memory, the work of matrix products, and how often the host waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.peak_bytes = 0
        self.product_flops = 0
        """Floating-point operations of matrix products, except those inside attention kernels."""
        self.waits: Counter[str] = Counter()
        """How often each line of code read a value from the GPU."""
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run one operation. A value that is read but unknown is 1."""
        if function in _READS:
            return self._value(*arguments)
        result = function(*arguments, **(named or {}))
        # An asynchronous copy is waited for later, by its event.
        copied = function is torch.ops.aten._to_copy.default and not (named or {}).get("non_blocking", False)
        if copied and result.device.type == "cpu":
            self._wait(arguments[0])
        if (count := _PRODUCTS.get(function.overloadpacket)) is not None:
            self.product_flops += count(*arguments, **(named or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                self._hold(leaf.untyped_storage())
        return result

    def forget(self) -> None:
        """Reset the counts, and the peak to the memory that is allocated now."""
        self.peak_bytes = self.held_bytes
        self.product_flops = 0
        self.waits.clear()

    def _value(self, tensor: Tensor) -> float | bool:
        self._wait(tensor)
        try:
            # The value is known if the tensor was made from numbers on the host.
            known: float | bool = torch.ops.aten._local_scalar_dense.default(tensor)
        except DataDependentOutputException:
            return {torch.bool: True}.get(tensor.dtype, 1.0 if tensor.is_floating_point() else 1)
        return known

    def _hold(self, storage: Any) -> None:
        key = id(storage)
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self._storages[key] = weakref.ref(storage, lambda _: self._let_go(key, size))
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _let_go(self, key: int, size: int) -> None:
        del self._storages[key]
        self.held_bytes -= size

    def _wait(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.waits[f"{frames[-1].filename}:{frames[-1].lineno}"] += 1


@contextlib.contextmanager
def imagined_rank(parallel: Any, world_size: int, rank: int = 0) -> Iterator[ImaginedGpu]:
    """Simulate rank `rank` of `world_size` ranks. Tensors created inside have no values.

    Collectives communicate with nobody.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert os.environ.get("LD_PRELOAD", "").endswith("imagined_gpu.so"), "start this process with `environment`"
    torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    gpu = ImaginedGpu()
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        with contextlib.ExitStack() as replaced:
            for owner, name, value in _replacements():
                replaced.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            # Rows come from the host with values; all tensors computed from them have none.
            with FakeTensorMode(allow_non_fake_inputs=True), gpu:
                yield gpu
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return the functions that need values, as owner, name and replacement."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random

    return [
        (nn.Module, "to", _moved),
        (dist, "all_gather_object", _same_everywhere),
        (param_and_grad_buffer, "_coalescing_manager", _coalesced),
        (random, "_get_cuda_rng_state", lambda *_, **__: torch.zeros(1)),
        (random, "_set_cuda_rng_state", lambda *_, **__: None),
    ]


def _moved(module: nn.Module, *to: Any, **named: Any) -> nn.Module:
    """Move a module without swapping tensors, as torch does, since fake tensors do not support it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            new = None if parameter is None else parameter.detach().to(*to, **named)
            if parameter is None or new is None or (new.device, new.dtype) == (parameter.device, parameter.dtype):
                continue
            part._parameters[name] = moved = nn.Parameter(new, parameter.requires_grad)
            # Copy the attributes that megatron set, but not those that describe the old tensor.
            vars(moved).update({k: v for k, v in vars(parameter).items() if k not in vars(moved)})
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(*to, **named)
    return module


def _same_everywhere(out: list[Any], value: Any, group: Any = None) -> None:
    out[:] = [value] * len(out)


@contextlib.contextmanager
def _coalesced(*_: Any, **__: Any) -> Iterator[Any]:
    yield _Arrived()


class _Arrived:
    """Handle of a finished collective."""

    def wait(self) -> None:
        """Do nothing."""
