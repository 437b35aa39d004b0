"""The only door to megatron's sharded checkpoints: tensors and plain data come through it, code does not.

megatron-core 0.19 and torch trust a checkpoint folder. They unpickle `.metadata`, and the objects among the shards
with `weights_only=False`, so that whoever writes a folder could run code where it is loaded; hashes do not help, since
they come with the folder. While this module reads, both places know the few classes that such files are made of and
nothing else, and shards are looked for inside the folder only.
"""

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from offline_align.errors import AlignError, StorageError

METADATA = ".metadata"
_RECORDS = "torch.distributed.checkpoint"
# All that torch's writer puts into `.metadata`: records without behaviour, and the names of number types.
_CLASSES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (f"{_RECORDS}.filesystem", "_StorageInfo"),
        *((f"{_RECORDS}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
        *(
            (f"{_RECORDS}.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)


class MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`; any class or function beyond those of torch's records ends it with UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the list; the name is compared whole, so that none is reached through another."""
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tensors and objects that `wanted` describes, as megatron's loader does; raises StorageError."""
    with _nothing_executes(folder):
        # A rank asks for what it has a part of, so that the one to which megatron counts a tensor may not want it.
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    return loaded


def tensors_metadata(folder: Path) -> dict[str, Any]:
    """Return shape and number type of every saved tensor, without data; raises StorageError."""
    with _nothing_executes(folder):
        found: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(folder))
    return found


@contextlib.contextmanager
def _nothing_executes(folder: Path) -> Iterator[None]:
    """Let torch read through the functions below, and say in one line what a file has that it should not."""
    if (folder / "common.pt").exists():
        # Older megatron pickled settings there; our checkpoints have none, and its reader heeds the environment.
        raise StorageError(
            f"{folder / 'common.pt'}: is not part of a checkpoint of ours; take one that `verify` passes"
        )
    reader: Any = FileSystemReader
    planner: Any = DefaultLoadPlanner
    before = reader.read_metadata, planner.load_bytes
    refusals: list[StorageError] = []

    def read_metadata(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        # torch 2.11 goes on without records that it could not read, and fails for the lack of them.
        try:
            return _read_metadata(self)
        except StorageError as error:
            refusals.append(error)
            raise

    reader.read_metadata, planner.load_bytes = read_metadata, _load_bytes
    try:
        yield
    except CheckpointException as error:
        # torch gathers what went wrong by rank; the first cause is what a user can act on.
        cause = refusals[0] if refusals else next(iter(error.failures.values()))[0]
        if isinstance(cause, AlignError):
            raise cause from None
        raise StorageError(f"{folder}: cannot be loaded: {str(cause).partition(chr(10))[0]}") from error
    finally:
        reader.read_metadata, planner.load_bytes = before


def _read_metadata(self: FileSystemReader) -> Metadata:
    path = Path(self.path) / METADATA
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        _check_names(metadata, path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a pickle can fail in any way
        raise StorageError(f"{path}: refused: {error}; nothing of it was run") from error
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    found: Metadata = metadata
    return found


def _check_names(metadata: Metadata, folder: Path) -> None:
    """Raise ValueError for a shard that is not a file of this very folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("holds no record of a checkpoint")
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ValueError(f"shard {name[:80]!r} is no file of the folder")


def _load_bytes(self: DefaultLoadPlanner, item: Any, value: io.BytesIO) -> None:
    """Take an object from the shards: tensors, numbers, texts and containers of them."""
    try:
        loaded = torch.load(value, weights_only=True)
    except Exception as error:
        raise StorageError(
            f"{item.dest_index.fqn}: refused: holds more than tensors and plain data; nothing of it was run"
        ) from error
    name = item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
