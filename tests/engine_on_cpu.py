"""Transformer Engine's layers without a GPU: its own Python code, with torch in place of its compiled kernels.

This tests what megatron and this project do with the layers: names, shapes, gradients, collectives and
checkpoints. The kernels themselves need a GPU (`tests/gpu`). `make test` unpacks the sources.
"""

import enum
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast
from unittest.mock import MagicMock

import torch
from torch import Tensor

from tests.support import REPOSITORY

SOURCES = Path(os.environ.get("OFFLINE_ALIGN_ENGINE", REPOSITORY / ".venv" / "engine"))
_KERNELS = "transformer_engine_torch"
_WITHOUT_KERNELS = {'load_framework_extension("torch")': "None"}
_ON_CPU = {"torch.cuda.is_available()": "True", ".is_cuda": ".is_cpu", 'device="cuda"': 'device="cpu"'}


class _Reader(SourceFileLoader):
    """Loads a source file with some expressions replaced."""

    read_as: ClassVar[dict[str, str]] = {}

    def get_code(self, fullname: str) -> CodeType:
        text = Path(self.path).read_text(encoding="utf-8")
        for asked, answered in self.read_as.items():
            text = text.replace(asked, answered)
        return compile(text, self.path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] != "transformer_engine" or name.startswith("transformer_engine.jax"):
            return None
        spec = PathFinder.find_spec(name, path or [str(SOURCES)], target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Reader(spec.loader.name, spec.loader.path)
        return spec


class _Number(enum.IntEnum):
    """The dtypes of the kernels, with Transformer Engine's numbers."""

    kByte = 0
    kInt32 = 1
    kFloat32 = 3
    kFloat16 = 4
    kBFloat16 = 5
    kFloat8E4M3 = 6
    kFloat8E5M2 = 7
    kFloat4E2M1 = 8


class _AttentionKernels(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Enumeration(type):
    """An enumeration whose members nothing here uses; all have the same value."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


_TYPES = {_Number.kFloat32: torch.float32, _Number.kFloat16: torch.float16, _Number.kBFloat16: torch.bfloat16}


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: int, _: int, zero_centered: bool
) -> tuple[Tensor, None, Tensor]:
    assert out is None and quantizer is None and not zero_centered
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * scale[..., None] * weight.float()).to(_TYPES[_Number(int(dtype))]), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, _: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    assert not zero_centered
    grad, normed = grad.reshape(x.shape).float(), x.float() * scale[..., None]
    scaled = grad * weight.float()
    to_input = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * scale[..., None]
    return to_input.to(x.dtype), (grad * normed).reshape(-1, x.size(-1)).sum(0).to(weight.dtype)


def generic_gemm(
    a: Tensor, a_turned: bool, b: Tensor, b_turned: bool, out: Tensor | None, quantizer: Any, dtype: int | None,
    bias: Tensor | None, _: Any, gelu: bool, __: Any, grad: bool, ___: Tensor, ____: int, accumulate: bool, *_____: Any,
    **______: Any,
) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """Return the product of `a` and `b` in cuBLAS's column-major order: in row-major order, `b` times `a`."""
    assert quantizer is None and not gelu
    left, right = (t.reshape(-1, t.size(-1)) for t in (b, a))
    product = (left.t() if b_turned else left) @ (right.t() if a_turned else right)
    bias_grad = left.sum(0) if bias is not None and grad else None
    if bias is not None and not grad:
        product = product + bias
    if not b_turned:
        product = product.reshape(*b.shape[:-1], -1)
    if out is not None:
        product = out.add_(product.view_as(out)) if accumulate else out.copy_(product.view_as(out))
    elif dtype is not None:
        product = product.to(_TYPES[_Number(int(dtype))])
    return product, bias_grad, None, None


def convert_thd_to_bshd(tokens: Tensor, boundaries: Tensor, batch: int, longest: int) -> Tensor:
    out = tokens.new_zeros(batch, longest, *tokens.shape[1:])
    for row, segment in zip(out, torch.split(tokens, boundaries.diff().tolist()), strict=True):
        row[: len(segment)] = segment
    return out


def convert_bshd_to_thd(rows: Tensor, boundaries: Tensor, total: int) -> Tensor:
    lengths = boundaries.diff().tolist()
    assert sum(lengths) == total
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def multi_tensor_l2norm(_: int, __: Tensor, lists: list[list[Tensor]], ___: bool = False) -> tuple[Tensor, None]:
    # The kernel assumes that all tensors have the dtype of the first one.
    assert len({t.dtype for t in lists[0]}) == 1
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


def multi_tensor_scale(_: int, __: Tensor, lists: list[list[Tensor]], factor: float | Tensor) -> None:
    assert len({t.dtype for part in lists for t in part}) == 1
    for source, out in zip(*lists, strict=True):
        out.copy_(source * factor)


def multi_tensor_adam(_: int, __: Tensor, lists: list[list[Tensor]], *rule: Any) -> None:
    for grad, weight, *moments in zip(*lists, strict=True):
        weight.copy_(_updated(weight.float(), grad.float(), *moments, *rule))


def multi_tensor_adam_param_remainder(_: int, __: Tensor, lists: list[list[Tensor]], *rule: Any) -> None:
    """Update fp32 weights that are stored as the nearest bf16 weight and the distance to it as int16."""
    for grad, weight, mean, square, remainder in zip(*lists, strict=True):
        bits = (weight.view(torch.int16).int() << 16) + remainder.int()
        exact = _updated(bits.view(torch.float32), grad.float(), mean, square, *rule).view(torch.int32)
        remainder.copy_(exact.to(torch.int16))
        weight.view(torch.int16).copy_((exact - remainder.int()) >> 16)


def _updated(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    step: int, decoupled: bool, corrected: bool, decay: float,
) -> Tensor:  # fmt: skip
    assert decoupled and corrected
    first = mean.float() * beta1 + grad * (1 - beta1)
    second = square.float() * beta2 + grad.square() * (1 - beta2)
    mean.copy_(first)
    square.copy_(second)
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    return weight - lr * (update + decay * weight)


def _kernels() -> ModuleType:
    """Return a replacement of the compiled extension; a kernel without a replacement fails when it is called."""
    module: Any = ModuleType(_KERNELS)
    module.__spec__ = ModuleSpec(_KERNELS, None)
    module.DType, module.NVTE_Fused_Attn_Backend = _Number, _AttentionKernels
    module.get_cudnn_version, module.get_cublasLt_version = lambda: 92000, lambda: 130000
    module.multi_tensor_scale_tensor = multi_tensor_scale
    own = (rmsnorm_fwd, rmsnorm_bwd, generic_gemm, convert_thd_to_bshd, convert_bshd_to_thd)
    adam = (multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam, multi_tensor_adam_param_remainder)
    for function in (*own, *adam):
        setattr(module, function.__name__, function)
    # Some modules use `import *`, so all names must exist beforehand.
    files = (SOURCES / "transformer_engine" / "pytorch").rglob("*.py")
    for name in {n for file in files for n in re.findall(r"\btex\.(\w+)", file.read_text(encoding="utf-8"))}:
        if name not in vars(module):
            setattr(module, name, _stand_in(name))
    module.__getattr__ = _stand_in
    return cast(ModuleType, module)


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return _Enumeration(name, (), {})

    def kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"the kernel {name} has no stand-in on the CPU")

    return kernel


def install() -> None:
    """Make `import transformer_engine` find the sources, for the rest of this process.

    Models are built from its layers only after `build_from_its_layers`.
    """
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.nvtx = SimpleNamespace(range_push=lambda _: None, range_pop=lambda: None)
    _import(_WITHOUT_KERNELS | _ON_CPU)


def install_on_imagined_gpu() -> None:
    """Build this process's models from its layers, with a GPU's attention that computes only shapes."""
    _import(_WITHOUT_KERNELS)
    kernels: Any = sys.modules[_KERNELS]
    kernels.get_fused_attn_backend = lambda _: (_AttentionKernels.NVTE_F16_arbitrary_seqlen, "")
    kernels.fused_attn_fwd, kernels.fused_attn_bwd = _attention_forward, _attention_backward
    kernels.multi_tensor_l2norm, kernels.multi_tensor_scale = _norm_on_gpu, _in_place_on_gpu
    kernels.multi_tensor_adam = kernels.multi_tensor_adam_param_remainder = _in_place_on_gpu
    attention: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = attention.get_attention_backend

    def choose_for_shapes(asked: Any) -> Any:
        asked.qkv_type = Tensor
        chosen = choose(asked)
        # The third value says whether cuDNN's attention is chosen.
        assert (asked.attn_mask_type, asked.qkv_layout, chosen[2]) == ("padding_causal", "thd_thd_thd", True)
        return chosen

    attention.get_attention_backend = choose_for_shapes
    from offline_align.model import backend

    backends: Any = backend
    backends.engine_is_installed = lambda: True
    backends._log_choice = lambda _: None


def _attention_forward(*arguments: Any) -> list[Tensor]:
    """Return the output, one number per query and head, and the state of a random generator."""
    boundaries, query = arguments[14:16], arguments[16]
    assert all(b.is_cuda and b.dtype is torch.int32 for b in boundaries)
    numbers = query.new_empty((*query.shape[:2], 1), dtype=torch.float32)
    return [torch.empty_like(query), numbers, query.new_empty(2, dtype=torch.int64)]


def _attention_backward(*arguments: Any) -> list[Tensor | None]:
    return [*map(torch.empty_like, arguments[19:22]), None, None]


def _norm_on_gpu(_: int, __: Tensor, lists: list[list[Tensor]], *___: Any) -> tuple[Tensor, None]:
    """Return a norm. Like the kernel, it needs no memory for each tensor."""
    assert all(tensor.is_cuda for tensor in lists[0])
    return lists[0][0].new_empty(1, dtype=torch.float32), None


def _in_place_on_gpu(_: int, __: Tensor, lists: list[list[Tensor]], *___: Any) -> None:
    """Change the tensors in place, which needs no memory."""
    for tensors in zip(*lists, strict=True):
        assert len({tensor.shape for tensor in tensors}) == 1 and all(tensor.is_cuda for tensor in tensors)


def _import(read_as: dict[str, str]) -> None:
    _Reader.read_as = read_as
    # The import must not look for the compiled extensions or for onnxscript.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = MagicMock()
    sys.modules[_KERNELS] = _kernels()
    sys.meta_path.insert(0, _Finder)
    # At the end of the path, so that the project's own packages take precedence.
    sys.path.append(str(SOURCES))
    importlib.import_module("transformer_engine.pytorch")


def build_from_its_layers(attention: str = "unfused") -> None:
    """Make commands on the CPU use Transformer Engine as on CUDA, including its optimizer.

    By default, its attention is its unfused implementation; `fused` does not exist on the CPU.
    """
    from megatron.core.transformer.enums import AttnBackend

    from offline_align.config import checks
    from offline_align.config.sections import Backend
    from offline_align.model import build
    from offline_align.train import optim

    fields = build._fields
    of_cuda = {"use_te_activation_func": False, "attention_backend": AttnBackend[attention]}
    patched: Any = build
    patched.choose_backend = lambda asked, *_: asked if asked is Backend.torch else Backend.transformer_engine
    patched._fields = lambda *given: fields(*given) | of_cuda
    optimizers: Any = optim
    optimizers._register_own_adam = lambda *_: None
    refusals: Any = checks
    refusals._transformer_engine = lambda _: []
