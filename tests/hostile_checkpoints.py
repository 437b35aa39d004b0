"""Hostile checkpoint folders: code among the records and shards, with matching hashes."""

import dataclasses
import functools
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline_align import lineage


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def system(marker: Path) -> bytes:
    return pickle.dumps(Call(os.system, f"touch '{marker}'"))


def evaluate(marker: Path) -> bytes:
    return pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w').close()"))


def touch(marker: Path) -> bytes:
    return pickle.dumps(Call(Path.touch, marker))


def by_getattr(marker: Path) -> bytes:
    """A method, which unpickling fetches with `getattr`."""
    return pickle.dumps(Call(Path(marker).touch))


def through_a_module(marker: Path) -> bytes:
    """A dotted name: `os.system`, reached through attributes of an allowed module."""
    return (
        b"\x80\x04"
        + _text("torch")
        + _text("serialization.os.system")
        + b"\x93"
        + _text(f"touch '{marker}'")
        + b"\x85R."
    )


def inside_a_record(marker: Path) -> bytes:
    """A valid record with the call in one field."""
    from torch.distributed.checkpoint.metadata import Metadata

    return pickle.dumps(Metadata({}, planner_data=Call(Path.touch, marker), storage_data={}))


def by_torch_load(marker: Path) -> bytes:
    """An unrestricted `torch.load` of a second file."""
    import torch

    second = marker.with_name("second.pt")
    torch.save(Call(Path.touch, marker), second)
    return pickle.dumps(Call(functools.partial(torch.load, weights_only=False), str(second)))


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


RECORDS: list[Callable[[Path], bytes]] = [
    system,
    evaluate,
    touch,
    by_getattr,
    through_a_module,
    inside_a_record,
    by_torch_load,
]


def put_record(folder: Path, content: bytes) -> None:
    """Replace `.metadata` of a checkpoint."""
    (folder / ".metadata").write_bytes(content)
    reseal(folder)


def put_object(folder: Path, key: str, value: Any) -> None:
    """Replace an object among the shards with `value`."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    shard = sorted(folder.glob("*.distcp"))[0]
    offset = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(buffer.getvalue())

    def moved(info: Any) -> Any:
        return dataclasses.replace(info, relative_path=shard.name, offset=offset, length=len(buffer.getvalue()))

    _edit(folder, key, moved)


def move_shard(folder: Path, name: str) -> None:
    """Make all tensors refer to the file `name`."""
    _edit(folder, "", lambda info: dataclasses.replace(info, relative_path=name))


def _edit(folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith(key):
            metadata.storage_data[index] = change(info)
    put_record(folder, pickle.dumps(metadata))


def reseal(folder: Path) -> None:
    """Update the recorded hashes of a checkpoint to its files, as anybody can."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "checkpoint.json")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": lineage.file_sha256(folder / name)} for name in names
    }
    (folder / "checkpoint.json").write_text(json.dumps({"files": files}))
