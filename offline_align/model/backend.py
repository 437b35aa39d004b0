"""The choice of layers: megatron-core's own with this project's attention, or Transformer Engine's."""

import importlib.util
import logging
import os
import shutil
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from offline_align.config.sections import Backend
from offline_align.errors import ConfigError

logger = logging.getLogger(__name__)

# Names of parameters in Transformer Engine's layers, which fuse a norm into the projection after it,
# and in megatron-core's own.
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def engine_is_installed() -> bool:
    """Return whether Transformer Engine for torch is installed, without importing it."""
    found = importlib.util.find_spec("transformer_engine")
    if found is None or found.origin is None:
        return False
    package = Path(found.origin).parent
    # `find_spec` cannot see the compiled extension before the package is imported. The file is in the
    # package after a build from source, in `wheel_lib` in wheels, and beside the package if editable.
    folders = (package, package / "wheel_lib", package.parent)
    return any(file.suffix == ".so" for folder in folders for file in folder.glob("transformer_engine_torch*"))


def choose_backend(asked: Backend, device: torch.device, bf16: bool = True) -> Backend:
    """Return the backend to build with.

    `auto` means Transformer Engine in bf16 on CUDA if it is installed, and torch otherwise. In fp32,
    Transformer Engine's matrix products would round to TF32, and its attention would pad every row.

    Raises ConfigError if Transformer Engine is requested and cannot be used.
    """
    usable = device.type == "cuda" and engine_is_installed()
    if asked is Backend.transformer_engine and not usable:
        reason = "is not installed" if device.type == "cuda" else "needs a CUDA device"
        raise ConfigError(f"model.backend=transformer_engine: it {reason}; use model.backend=torch or auto")
    wanted = bf16 if asked is Backend.auto else asked is Backend.transformer_engine
    chosen = Backend.transformer_engine if usable and wanted else Backend.torch
    _log_choice(chosen)
    return chosen


@cache
def can_compile() -> bool:
    """Return whether Triton and `torch.compile` work: they need a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return compiler is not None and has_headers and importlib.util.find_spec("triton") is not None


def has_kernels(tensor: Tensor) -> bool:
    """Return whether this project's Triton kernels can run on `tensor`."""
    return tensor.is_cuda and can_compile()


@cache
def _log_choice(chosen: Backend) -> None:
    """Log the choice once per process."""
    package = "transformer_engine" if chosen is Backend.transformer_engine else "torch"
    logger.info("model.backend: %s %s", chosen, metadata.version(package))


def torch_name(name: str) -> str:
    """Return the torch backend's name of a parameter that either backend calls `name`."""
    for fused, own in _TRANSFORMER_ENGINE_NAMES.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + own
    return name
