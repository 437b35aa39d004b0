"""Find, check and open the safetensors files of a Hugging Face folder without reading weights."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from offline_align.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`, after checking that each is inside it.

    A single file takes precedence over an index, as in `transformers`; a warning names the ignored
    index. Raises ConfigError if there are none (pickled weights are refused, because loading them
    runs code), or if the index names a path outside the folder.
    """
    if (folder / SINGLE).is_file():
        if ignored_index(folder) is not None:
            logger.warning("%s: %s is read; %s beside it is ignored: remove the older one", folder, SINGLE, INDEX)
        return [_inside(folder, SINGLE)]
    if (folder / INDEX).is_file():
        return [_inside(folder, name) for name in sorted(set(_weight_map(folder).values()))]
    pickled = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickled:
        raise ConfigError(
            f"init.from: {folder} has {pickled[0]} and no safetensors: loading a pickle can run any code, "
            "so it is refused; save the model as safetensors first"
        )
    raise ConfigError(f"init.from: {folder} has neither {SINGLE} nor {INDEX}; give a folder with weights")


def ignored_index(folder: Path) -> Path | None:
    """Return the index that is ignored because a single weights file takes precedence, or None."""
    both = (folder / SINGLE).is_file() and (folder / INDEX).is_file()
    return folder / INDEX if both else None


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        mapping = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"init.from: {folder / INDEX} is not a weight index ({error!r})") from error
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise ConfigError(f"init.from: {folder / INDEX}: weight_map must map tensor names to file names")
    return mapping


def _inside(folder: Path, name: str) -> Path:
    """Return `folder/name`; raises ConfigError if it is missing or leads out of the folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name or relative.suffix != ".safetensors":
        raise ConfigError(f"init.from: {folder / INDEX} names {name!r}, which is not a safetensors file inside it")
    path = (folder / name).resolve()
    if not any(path.is_relative_to(allowed) for allowed in _allowed_roots(folder.resolve())):
        raise ConfigError(f"init.from: {folder / name} is a link to {path}, outside the folder; copy it there")
    if not path.is_file():
        raise ConfigError(f"init.from: {folder / name} is missing; download the folder again")
    return path


def _allowed_roots(folder: Path) -> list[Path]:
    # In the Hub's cache, files of snapshots/<revision> are links into blobs/ of the same repository.
    if folder.parent.name == "snapshots":
        return [folder, folder.parent.parent / "blobs"]
    return [folder]


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every tensor of `folder` by name as a safetensors slice, whose data is not read yet.

    Raises ConfigError (see `weight_files`, and for a tensor in two files), StorageError for a
    damaged file.
    """
    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise StorageError(f"{path} is damaged ({error}); download it again") from error
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                if name in slices:
                    raise ConfigError(f"init.from: {folder}: tensor {name} is in two files; keep one")
                slices[name] = handle.get_slice(name)
        yield slices


_MOST_HEADER_BYTES = 2**26
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(folder: Path) -> str | None:
    """Return the precision of the embedding in `folder`, or None if it cannot be read or is another one.

    Reads headers alone, without torch. Whoever reads the weights says what is wrong with them.
    """
    single = folder / SINGLE
    for path in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, _MOST_HEADER_BYTES)))
            return _DTYPES.get(header["model.embed_tokens.weight"]["dtype"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return None
