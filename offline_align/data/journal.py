"""Journals: append-only files, one per rank, that save the results of long work as they are computed.

An entry is one line with a JSON object and a checksum, which also covers the name of the journal's
folder. Folders are named after content keys. A line that was truncated by a kill, damaged on disk
or copied from a run with other settings is therefore recognised and skipped, and its result is
computed again. Nothing needs to be repaired by hand.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offline_align.errors import StorageError
from offline_align.lineage.files import fsync_path
from offline_align.wording import counted

logger = logging.getLogger(__name__)
_CHECKSUM = "crc32"


class JournalFile:
    """One append-only file of entries; `name` is part of every checksum."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def read(self) -> list[dict[str, Any]]:
        """Return the intact entries, none if there is no file. Raises StorageError if it is unreadable."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        read = [unsealed(line, self.name) for line in lines]
        # The last piece is empty, or a line that a killed process left incomplete.
        damaged = [number for number, line in enumerate(lines[:-1], start=1) if line and read[number - 1] is None]
        if damaged:
            first = f"{self.path}:{damaged[0]}"
            logger.warning(
                "%s: %s skipped; the results are computed again", first, counted(len(damaged), "damaged line")
            )
        return [entry for entry in read if entry is not None]

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries; they are on disk when this returns. Raises StorageError."""
        content = "".join(sealed(entry, self.name) for entry in entries).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                if not _ends_whole(file.fileno()):
                    content = b"\n" + content  # start a new line after an incomplete one
                _write_all(file.fileno(), content)
                os.fsync(file.fileno())
            fsync_path(self.path.parent)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror or error}") from error


class Journal:
    """The results of one run so far; a rank appends to its own file and reads the files of all ranks."""

    def __init__(self, run_dir: Path, key: str, rank: int) -> None:
        self.folder = run_dir / "journal" / key[:16]
        self.path = self.folder / f"part_{rank:05d}.jsonl"
        self._stop = self.folder / "stop"

    def read(self) -> list[dict[str, Any]]:
        """Return the intact entries of all ranks; raises StorageError if a file cannot be read."""
        paths = sorted(self.folder.glob("part_*.jsonl"))
        return [entry for path in paths for entry in JournalFile(path, self.folder.name).read()]

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries to this rank's file; they are on disk when this returns. Raises StorageError."""
        JournalFile(self.path, self.folder.name).append(entries)

    def ask_to_stop(self) -> None:
        """Ask the other ranks, through the shared file system, to stop too; raises StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stop.touch()
        except OSError as error:
            raise StorageError(f"{self._stop}: cannot be written: {error.strerror or error}") from error

    def stop_is_asked(self) -> bool:
        """Return whether a rank has asked all ranks to stop."""
        return self._stop.exists()

    def forget_stop(self) -> None:
        """Remove the stop request of an earlier attempt; raises StorageError."""
        try:
            self._stop.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self._stop}: cannot be removed: {error.strerror or error}") from error

    def remove_others(self) -> None:
        """Delete the other journals of the run, whose results are no longer needed."""
        for folder in self.folder.parent.glob("*"):
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the journals of the run, once its output has all results."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def sealed(entry: dict[str, Any], name: str) -> str:
    """Return an entry as a line with a checksum, which also covers the `name` of the journal."""
    text = json.dumps(entry)
    return f'{text[:-1]}, "{_CHECKSUM}": {_checksum(text, name)}}}\n'


def unsealed(line: bytes, name: str) -> dict[str, Any] | None:
    """Return the entry of a line, or None if it is truncated, damaged or from another journal."""
    try:
        entry = json.loads(line)
        checksum = entry.pop(_CHECKSUM)
        same = checksum == _checksum(json.dumps(entry), name)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return entry if same else None


def _checksum(text: str, name: str) -> int:
    return zlib.crc32(text.encode(), zlib.crc32(name.encode()))


def _ends_whole(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
