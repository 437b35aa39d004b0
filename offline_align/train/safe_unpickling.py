"""Load megatron's sharded checkpoints without executing code from them.

megatron-core 0.19 and torch trust a checkpoint folder. They unpickle `.metadata`, and the objects among
the shards with `weights_only=False`, so whoever writes a folder can run code in the process that loads
it. Hashes do not help, because they come with the folder.

All loading goes through this module. It restricts both places to the few classes that such files
consist of, and it reads shards from inside the folder only.
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
# All that torch's writer puts into `.metadata`: plain record classes and the names of dtypes.
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
    """Reads `.metadata`. Raises UnpicklingError for any class or function that is not one of torch's records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class. The full name must match, so a dotted name cannot reach another object."""
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return super().find_class(module, name)


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tensors and objects that the sharded state dict `wanted` describes. Raises StorageError."""
    with _restricted_unpickling(folder):
        # megatron's integrity check expects the main replica of every tensor to be requested. Here a
        # rank requests only the parts that it needs, so the check does not apply.
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    return loaded


def tensors_metadata(folder: Path) -> dict[str, Any]:
    """Return shape and dtype of every saved tensor, without data. Raises StorageError."""
    with _restricted_unpickling(folder):
        found: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(folder))
    return found


@contextlib.contextmanager
def _restricted_unpickling(folder: Path) -> Iterator[None]:
    """Make torch read through the functions below, and turn its errors into a StorageError of one line."""
    if (folder / "common.pt").exists():
        # Older versions of megatron pickled settings into this file. Checkpoints of this project never
        # have it, and an environment variable can make megatron unpickle it without restrictions.
        raise StorageError(
            f"{folder / 'common.pt'}: is not part of a checkpoint of this project; take one that `verify` passes"
        )
    reader: Any = FileSystemReader
    planner: Any = DefaultLoadPlanner
    before = reader.read_metadata, planner.load_bytes
    refusals: list[StorageError] = []

    def read_metadata(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        # torch 2.11 continues after an error here and fails later with an unrelated one.
        try:
            return _read_metadata(self)
        except StorageError as error:
            refusals.append(error)
            raise

    reader.read_metadata, planner.load_bytes = read_metadata, _load_bytes
    try:
        yield
    except CheckpointException as error:
        # torch collects the errors of all ranks. The first cause is what a user can act on.
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
        raise StorageError(f"{path}: refused: {error}; no code of it was run") from error
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    found: Metadata = metadata
    return found


def _check_names(metadata: Metadata, folder: Path) -> None:
    """Raise ValueError if a shard is not a regular file directly in this folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("is not the metadata of a checkpoint")
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise ValueError(f"shard {name[:80]!r} is not a file of the folder")


def _load_bytes(self: DefaultLoadPlanner, item: Any, value: io.BytesIO) -> None:
    """Load an object of the shards that consists of tensors, numbers, strings and containers of them."""
    try:
        loaded = torch.load(value, weights_only=True)
    except Exception as error:
        raise StorageError(
            f"{item.dest_index.fqn}: refused: holds more than tensors and plain data; no code of it was run"
        ) from error
    name = item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
