"""Write safetensors files of limited size and their index, one tensor at a time."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from offline_align.convert.files import INDEX, SINGLE
from offline_align.errors import ConfigError, StorageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, key: str = "convert.max_shard_size") -> int:
    """Return a size such as `5GB` or `500MiB` in bytes; raises ConfigError naming `key`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size <= 0:
        raise ConfigError(f"{key}={text}: write a size with its unit, such as 5GB or 500MB")
    return size


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> list[Path]:
    """Write the tensors into `folder` and return the files: a single one, or numbered shards and an index.

    Only the tensors of one shard are held in memory. Raises StorageError.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(pending, folder, len(shards) + 1))
            pending, pending_bytes = {}, 0
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    shards.append(_write_shard(pending, folder, len(shards) + 1))
    return _finish(shards, folder, total_bytes)


def _write_shard(tensors: dict[str, Tensor], folder: Path, number: int) -> tuple[Path, list[str]]:
    path = folder / f".shard-{number:05d}.tmp"
    # `save_file` refuses views of a larger storage as shared memory.
    owned = {name: tensor.clone() if _is_view(tensor) else tensor for name, tensor in tensors.items()}
    try:
        save_file(owned, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    return path, list(tensors)


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def _finish(shards: list[tuple[Path, list[str]]], folder: Path, total_bytes: int) -> list[Path]:
    """Rename the shards, whose names contain the total number, and write the index if there are several."""
    if len(shards) == 1:
        return [shards[0][0].replace(folder / SINGLE)]
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    for number, (path, tensor_names) in enumerate(shards, start=1):
        files.append(path.replace(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"))
        weight_map |= dict.fromkeys(tensor_names, files[-1].name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, folder / INDEX]
