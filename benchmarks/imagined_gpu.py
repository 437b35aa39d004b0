"""A GPU that is not there: torch believes in an H100, whose tensors have shapes, types and a place but no values.

The same code runs as on a real one, its collectives and streams included, for any layout of ranks and models of any
size, in seconds. What it shows: that no tensor is on the wrong device or of the wrong type, how much memory is held at
once, and how often the host waits for a value. What it cannot show: values, time, and whatever is inside a kernel.

`environment` gives what a process must be started with; in that process `imagined_rank` is one rank of many.
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
# The one that works in place torch does not count, and of attention over packed rows it says what one long row costs.
_PRODUCTS = {product: flop_registry[product] for product in (torch.ops.aten.mm, torch.ops.aten.addmm)}
_PRODUCTS[torch.ops.aten.addmm_] = _PRODUCTS[torch.ops.aten.addmm]
# The first is the second in inference mode.
_READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
# What torch's allocator on CUDA rounds sizes up to.
_BLOCK_BYTES = 512


class Unavailable(Exception):
    """This machine cannot imagine a GPU: no C compiler, or a torch without CUDA."""


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a process that is to see an imagined GPU, whose library is put into `folder`.

    Raises Unavailable, and CalledProcessError where the library cannot be compiled, which is no lack of the machine.
    """
    library = folder / "imagined_gpu.so"
    if torch.version.cuda is None:
        raise Unavailable("this torch is built without CUDA")
    headers = [f"-I{path}" for path in _headers()]
    # One that says it is the driver is taken for it, by whoever asks for that name.
    command = ["cc", "-shared", "-fPIC", "-w", *headers, "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
    try:
        subprocess.run(command, input=_source(), text=True, check=True)
    except FileNotFoundError as error:
        raise Unavailable("no C compiler: cc") from error
    return {
        "LD_PRELOAD": str(library),
        "CUDA_VISIBLE_DEVICES": "0",
        # Compilers would run kernels; the functions that megatron compiles run as they are written.
        "TORCHDYNAMO_DISABLE": "1",
        # Memory that grows in place is the driver's.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    }


def _headers() -> list[Path]:
    """Return the folders of CUDA's headers that torch and Triton bring, first those of torch's own version."""
    packages = Path(torch.__file__).parents[1]
    return [*packages.glob("nvidia/*/include"), packages / "triton" / "backends" / "nvidia" / "include"]


def _source() -> str:
    """Return the C source, with a function that does nothing for each one of the driver that torch looks up."""
    text = SOURCE.read_text(encoding="utf-8")
    binary = (Path(torch.__file__).parent / "lib" / "libc10_cuda.so").read_bytes()
    names = sorted({name.decode() for name in re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", binary)})
    return text + "".join(f"int {name}(void) DONE\n" for name in names if f"int {name}(" not in text)


class ImaginedGpu(TorchDispatchMode):
    """Counts the memory that is held, the work of products, and the times that the host asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.peak_bytes = 0
        self.product_flops = 0
        """Floating-point operations of matrix products, without those inside of kernels for attention."""
        self.waits: Counter[str] = Counter()
        """How often each line of code asked for a value that is on the GPU."""
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        """Run one operation; a value that nobody knows is 1."""
        if function in _READS:
            return self._value(*arguments)
        result = function(*arguments, **(named or {}))
        if function is torch.ops.aten._to_copy.default and result.device.type == "cpu":
            self._wait(arguments[0])
        if (count := _PRODUCTS.get(function.overloadpacket)) is not None:
            self.product_flops += count(*arguments, **(named or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                self._hold(leaf.untyped_storage())
        return result

    def forget(self) -> None:
        """Begin to count anew, the peak from what is held now."""
        self.peak_bytes = self.held_bytes
        self.product_flops = 0
        self.waits.clear()

    def _value(self, tensor: Tensor) -> float | bool:
        self._wait(tensor)
        try:
            # Of a tensor that was made of numbers on the host.
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
    """Be rank `rank` of an imagined world; tensors made inside have no values. Collectives reach nobody."""
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
            # Rows come from the host with their values; from there on nobody has any.
            with FakeTensorMode(allow_non_fake_inputs=True), gpu:
                yield gpu
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return what cannot be done without values: owner, name, and what is done in its place."""
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
    """torch would swap the tensors, which those without values refuse."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            new = None if parameter is None else parameter.detach().to(*to, **named)
            if parameter is None or new is None or (new.device, new.dtype) == (parameter.device, parameter.dtype):
                continue
            part._parameters[name] = moved = nn.Parameter(new, parameter.requires_grad)
            # What megatron has written onto it; not what makes it a tensor of its old place.
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
    """Of a collective."""

    def wait(self) -> None:
        """Do nothing."""
