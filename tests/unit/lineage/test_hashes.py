"""Hashes of files, and atomic replacement of files."""

from pathlib import Path

import pytest

from offline_align.errors import StorageError
from offline_align.lineage import (
    file_sha256,
    write_atomically,
)


def test_file_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_sha256_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone.*No such file"):
        file_sha256(tmp_path / "gone")


def test_write_atomically_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
