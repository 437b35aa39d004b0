"""Which layers a model is built from: megatron-core's own with our attention, or Transformer Engine's."""

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

# Transformer Engine keeps a norm inside the projection that follows it.
_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def engine_is_installed() -> bool:
    """Whether Transformer Engine's torch part can be found, without importing it."""
    found = importlib.util.find_spec("transformer_engine")
    if found is None or found.origin is None:
        return False
    package = Path(found.origin).parent
    # Its compiled part lies in the package where that was built from source, below it in wheels, beside it where
    # editable: out of the global names, until the package is imported.
    places = (package, package / "wheel_lib", package.parent)
    return any(file.suffix == ".so" for place in places for file in place.glob("transformer_engine_torch*"))


def choose_backend(asked: Backend, device: torch.device, bf16: bool = True) -> Backend:
    """Return the backend to build with: `auto` takes Transformer Engine on CUDA where it is installed.

    In fp32 it does not: products of Transformer Engine would round to TF32, and its attention would pad every row.

    Raises ConfigError where Transformer Engine was asked for and cannot be used.
    """
    usable = device.type == "cuda" and engine_is_installed()
    if asked is Backend.transformer_engine and not usable:
        reason = "is not installed" if device.type == "cuda" else "needs a CUDA device"
        raise ConfigError(f"model.backend=transformer_engine: it {reason}; use model.backend=torch or auto")
    wanted = bf16 if asked is Backend.auto else asked is Backend.transformer_engine
    chosen = Backend.transformer_engine if usable and wanted else Backend.torch
    _say(chosen)
    return chosen


@cache
def can_compile() -> bool:
    """Whether Triton, and with it `torch.compile`, can work: it needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return compiler is not None and has_headers and importlib.util.find_spec("triton") is not None


def has_kernels(tensor: Tensor) -> bool:
    """Whether this project's Triton kernels work on `tensor`."""
    return tensor.is_cuda and can_compile()


@cache
def _say(chosen: Backend) -> None:
    """Log the choice, once a process."""
    package = "transformer_engine" if chosen is Backend.transformer_engine else "torch"
    logger.info("model.backend: %s %s", chosen, metadata.version(package))


def torch_name(name: str) -> str:
    """Return what the torch backend calls a parameter that Transformer Engine may call `name`."""
    for engine, own in _ENGINE_NAMES.items():
        if name.endswith(f".{engine}"):
            return name.removesuffix(engine) + own
    return name
