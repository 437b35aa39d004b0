"""Untrusted checkpoints with correct hashes: code that torch would execute on loading is not executed."""

import contextlib
import functools
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from offline_align.config.sections import ParallelSection, RunSection
from offline_align.distributed.setup import session
from offline_align.errors import StorageError
from offline_align.train import safe_unpickling
from offline_align.train.checkpoint import newest
from tests.hostile_checkpoints import RECORDS, Call, move_shard, put_object, put_record
from tests.training import samples, train, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    found = newest(train("sft", folder / "run", write_jsonl(folder / "rows.jsonl", samples()), "trainer.max_steps=1"))
    assert found is not None
    return found


@pytest.fixture(scope="module", autouse=True)
def _ranks(base: Path) -> Iterator[None]:
    with session(ParallelSection(), RunSection(dir="unused")):
        yield


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "checkpoint")


def test_an_honest_checkpoint_is_read(folder: Path) -> None:
    tensors = safe_unpickling.tensors_metadata(folder)
    assert tensors["embedding.word_embeddings.weight"].global_shape[1] == 32
    assert safe_unpickling.load({}, folder)["content_metadata"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_code_among_the_records_does_not_run(folder: Path, tmp_path: Path, record: Callable[[Path], bytes]) -> None:
    marker = tmp_path / "executed"
    put_record(folder, record(marker))
    with contextlib.suppress(Exception):  # torch itself executes it, or this test would show nothing
        reader: Any = FileSystemReader
        reader(folder).read_metadata()
    assert marker.exists()
    marker.unlink()
    doors: list[Callable[[Path], Any]] = [functools.partial(safe_unpickling.load, {}), safe_unpickling.tensors_metadata]
    for read in doors:
        with pytest.raises(StorageError, match=r"\.metadata: refused: .* is not allowed in it; no code of it was run"):
            read(folder)
    assert not marker.exists()


def test_code_among_the_objects_does_not_run(folder: Path, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    marker = tmp_path / "executed"
    put_object(folder, "common_state", Call(Path.touch, marker))
    with pytest.raises(TypeError):
        load_common_state_dict(str(folder))
    assert marker.exists()
    marker.unlink()
    with pytest.raises(StorageError, match=r"common_state.*more than tensors and plain data"):
        safe_unpickling.load({}, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x.distcp", "/etc/hostname", "a/b", "link", "..", "x\0y", "n" * 5000])
def test_shards_are_looked_for_in_the_folder_only(folder: Path, name: str) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    move_shard(folder, name)
    with pytest.raises(StorageError, match=r"\.metadata: (refused|cannot be read)"):
        safe_unpickling.tensors_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({}), pickle.dumps(3), b"junk" * 99])
def test_what_is_no_record_is_one_line(folder: Path, content: bytes) -> None:
    put_record(folder, content)
    with pytest.raises(StorageError, match=r"\.metadata: refused") as error:
        safe_unpickling.tensors_metadata(folder)
    assert "\n" not in str(error.value)


def test_settings_of_older_megatron_are_refused(folder: Path) -> None:
    torch.save({}, folder / "common.pt")
    with pytest.raises(StorageError, match=r"common\.pt: is not part"):
        safe_unpickling.load({}, folder)


def test_torch_is_as_it_was_afterwards(folder: Path) -> None:
    before = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes
    safe_unpickling.tensors_metadata(folder)
    assert (FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes) == before


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "Size.__class__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch.storage", "_load_from_bytes"),
    ],
)
def test_nothing_is_found_beyond_the_list(module: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with (tmp_path / "x").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="not allowed"):
        safe_unpickling.MetadataUnpickler(file).find_class(module, name)
