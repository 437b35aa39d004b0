"""The journal of a labelling run: every score is on disk soon after it is known, and none is counted twice.

Each data parallel rank appends lines `{"row": index, "score": value}` to a file of its own. A later attempt, at any
number of ranks, reads all files, forgets a torn last line and scores what is missing.
"""

import json
import os
from pathlib import Path
from types import TracebackType

from offline_align.errors import StorageError


def read_journal(folder: Path) -> dict[int, float]:
    """Return the scores that earlier attempts have written, by row."""
    found: dict[int, float] = {}
    for path in sorted(folder.glob("part_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                found[int(entry["row"])] = float(entry["score"])
            except (ValueError, KeyError, TypeError):
                # Cut off by the end of an earlier attempt: the row is scored again.
                continue
    return found


class JournalWriter:
    """Appends the scores of one rank, flushed to disk every `flush_rows` rows and at the end."""

    def __init__(self, folder: Path, rank: int, flush_rows: int, enabled: bool = True) -> None:
        self.flush_rows = flush_rows
        self._waiting: list[str] = []
        self._file = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"part_{rank:05d}.jsonl"
            torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", encoding="utf-8")
            if torn:
                self._file.write("\n")

    def __enter__(self) -> "JournalWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()

    def add(self, row: int, score: float) -> None:
        """Note the score of a row."""
        self._waiting.append(json.dumps({"row": row, "score": score}))
        if len(self._waiting) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Bring everything noted so far to disk; raises StorageError where that fails."""
        if self._file is None or not self._waiting:
            self._waiting.clear()
            return
        try:
            self._file.write("".join(f"{line}\n" for line in self._waiting))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"{self._file.name}: cannot write: {error.strerror or error}") from error
        self._waiting.clear()
