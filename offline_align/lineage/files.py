"""Hash files and folders, and replace files atomically."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.errors import StorageError
from offline_align.progress import announced
from offline_align.wording import counted


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The path, SHA-256 in hexadecimal and size in bytes of one file."""

    path: str
    sha256: str
    bytes: int


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises StorageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of all files in a folder. Raises StorageError."""
    root = folder.resolve()
    files = expand([root])
    names = [file.relative_to(root).as_posix() for file in files]
    return named_sha256(dict(zip(names, hash_all(files), strict=True)))


def named_sha256(hashes: dict[str, str]) -> str:
    """Return the SHA-256 of a folder from the SHA-256 of its files, by their paths in the folder."""
    return text_sha256(canonical_json(hashes))


def record_files(paths: Sequence[Path]) -> list[FileRecord]:
    """Return a record, with absolute path, of each file and of all files in each folder."""
    files = expand(paths)
    hashes = hash_all(files)
    return [FileRecord(str(f), h, file_size(f)) for f, h in zip(files, hashes, strict=True)]


def expand(paths: Iterable[Path]) -> list[Path]:
    """Return the absolute paths of files, with each folder replaced by all files in it.

    Hidden folders (caches, unfinished checkpoints) and links to folders are left out.
    """
    return [real_path(file) for path in paths for file in _files(path)]


def hash_all(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file; threads run in parallel, because hashing releases the GIL."""
    work = f"hashing {counted(len(files), 'file')}" + (f" of {files[0].parent}" if files else "")
    with (
        announced(work, sum(map(file_size, files))),
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
    ):
        return list(pool.map(file_sha256, files))


def real_path(path: Path) -> Path:
    """Return the path with only its folder resolved: the file may be a link to another name."""
    return path.parent.resolve() / path.name


def file_size(path: Path) -> int:
    """Return the size in bytes, or -1 if there is no file."""
    return path.stat().st_size if path.is_file() else -1


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file atomically: a crash leaves the old or the new one. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def canonical_json(value: Any) -> str:
    """Return JSON in a canonical form: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (file for name in sorted(names) if (file := Path(folder, name)).is_file())


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
