"""Verification of checkpoints: every change is detected, and links and old checkpoints follow the state."""

import json
from pathlib import Path

import pytest
import torch

from offline_align.distributed.setup import Ranks
from offline_align.errors import StorageError
from offline_align.train import checkpoint
from offline_align.train.checkpoint import TrainState

ALONE = Ranks(0, 1, 0, 1, 0, 1, 0, 1, torch.device("cpu"))


def make(run_dir: Path, step: int) -> Path:
    """Write a folder with the files of a checkpoint, each a few hundred bytes at most."""
    folder = checkpoint.step_folder(run_dir, step)
    (folder / "tokenizer").mkdir(parents=True)
    contents = {
        "__0_0.distcp": bytes(range(64)),
        # This name differs from the one above in one bit, so a flip in the manifest can merge two entries.
        "__1_0.distcp": bytes(reversed(range(64))),
        ".metadata": b"\x80\x04record",
        "metadata.json": b'{"sharded_backend": "torch_dist"}',
        "state.json": json.dumps({"step": step}).encode(),
        "tokenizer/tokenizer.json": b"{}",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: checkpoint.entry(folder / name) for name in contents}
    (folder / checkpoint.FILES_NAME).write_text(checkpoint.manifest_text(files))
    return folder


def test_every_bit_of_every_file_counts(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert checkpoint.damage(folder, ALONE) == []
    flipped = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = bytearray(path.read_bytes())
        for bit in range(8 * len(content)):
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            assert checkpoint.damage(folder, ALONE) == [str(path.relative_to(folder))], (path, bit)
            content[bit // 8] ^= 1 << bit % 8
            flipped += 1
        path.write_bytes(content)
    assert checkpoint.damage(folder, ALONE) == []
    assert flipped > 6_000


def test_every_length_of_the_manifest_but_its_own_is_damage(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    path = folder / checkpoint.FILES_NAME
    content = path.read_bytes()
    for length in range(len(content) - 1):  # the final newline does not matter
        path.write_bytes(content[:length])
        assert checkpoint.damage(folder, ALONE) == [checkpoint.FILES_NAME]
    for other in (b"[]", b"null", b'{"files": 1}', b'{"files": {}}', b'{"files": {"state.json": 3}}', b"[" * 100_000):
        path.write_bytes(other)
        assert checkpoint.damage(folder, ALONE), other


@pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "a\0b", "x" * 5000, "tokenizer/../../../x"])
def test_a_sealed_manifest_that_names_files_elsewhere_is_damage(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 1)
    (tmp_path / "x").write_bytes(b"secret")
    files = json.loads((folder / checkpoint.FILES_NAME).read_text())["files"]
    files[name] = checkpoint.entry(tmp_path / "x")
    (folder / checkpoint.FILES_NAME).write_text(checkpoint.manifest_text(files))
    assert checkpoint.damage(folder, ALONE) == [checkpoint.FILES_NAME]
    with pytest.raises(StorageError, match="is not as it was written"):
        checkpoint.digest(folder)


@pytest.mark.parametrize("content", [b"[]", b'{"step": 1, "more": 2}', b"[" * 100_000, b"\xff"])
def test_a_strange_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / checkpoint.STATE_NAME).write_bytes(content)
    with pytest.raises(StorageError, match="is not the state of a run"):
        checkpoint.read_state(tmp_path)


def test_damaged_ones_are_set_aside_until_they_are_made_again(tmp_path: Path) -> None:
    make(tmp_path, 2)
    for step in (4, 6):
        (make(tmp_path, step) / ".metadata").write_bytes(b"")
    checkpoint.link(checkpoint.step_folder(tmp_path, 6), "latest")
    assert checkpoint.newest_whole(tmp_path, ALONE) == checkpoint.step_folder(tmp_path, 2)
    folder = tmp_path / checkpoint.FOLDER
    assert (folder / "latest").resolve().name == "step_00000002"

    def hidden() -> list[str]:
        return sorted(path.name[:22] for path in folder.glob(".*"))

    assert hidden() == [".step_00000004.damaged", ".step_00000006.damaged"]
    make(tmp_path, 4)
    checkpoint.update_links_and_prune(tmp_path, TrainState(step=4), keep=2)
    assert hidden() == [".step_00000006.damaged"]


def test_old_ones_go_and_leftovers_too(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    folder = tmp_path / checkpoint.FOLDER
    (folder / ".step_00000005.tmp-0").mkdir()
    (folder / ".latest.tmp-0").symlink_to("step_00000001")
    checkpoint.update_links_and_prune(tmp_path, TrainState(step=4, best_step=1), keep=2)
    left = {path.name for path in folder.iterdir()}
    assert left == {"step_00000001", "step_00000003", "step_00000004", "latest", "best"}
    assert (folder / "best").resolve().name == "step_00000001"
    assert (folder / "latest").resolve().name == "step_00000004"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_best_loss_that_is_not_finite_is_none(tmp_path: Path, value: str) -> None:
    folder = make(tmp_path, 1)
    (folder / checkpoint.STATE_NAME).write_text(f'{{"step": 1, "best_step": 1, "best_value": {value}}}')
    state = checkpoint.read_state(folder)
    assert (state.best_step, state.best_value) == (None, None)
    checkpoint.link(folder, "best")
    checkpoint.update_links_and_prune(tmp_path, state, keep=1)
    assert not (tmp_path / checkpoint.FOLDER / "best").is_symlink()


def test_a_run_that_has_lost_its_checkpoints_does_not_start_again(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path, ALONE) is None
    folder = make(tmp_path, 2)
    checkpoint.link(folder, "latest")
    (folder / "state.json").unlink()
    with pytest.raises(StorageError, match=r"no checkpoint is whole \(step_00000002: state.json\)"):
        checkpoint.newest_whole(tmp_path, ALONE)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="points to step_00000002, which is gone"):
        checkpoint.newest_whole(tmp_path, ALONE)
