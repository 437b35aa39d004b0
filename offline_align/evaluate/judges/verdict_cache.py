"""Verdicts that were paid for are never asked for again: `verdicts.jsonl` in the run folder."""

import hashlib
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from offline_align.data.journal import sealed, unsealed
from offline_align.errors import StorageError

logger = logging.getLogger(__name__)
# Part of every checksum; verdicts are known by what was asked, not by the run.
_NAME = "verdicts"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The scores of answers as they were shown, None where no reply could be read.

    `reply` is the last one, or the words in which the server refused the question; `problem` says in a few words why
    there are no scores.
    """

    key: str
    id: str
    scores: list[float] | None
    reply: str
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    problem: str = ""
    refused: bool = False


class VerdictCache:
    """Verdicts by the hash of model and request; every new one is on disk before it counts."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that is torn or damaged is dropped and its verdict asked for again."""
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[str, Verdict] = {}
        lines = self._lines()
        entries = [entry for line in lines if (entry := unsealed(line, _NAME)) is not None]
        # The last piece is empty, or the line that a kill has cut.
        if damaged := sum(map(bool, lines[:-1])) - len(entries):
            logger.warning("%s: %d damaged verdicts are passed over and asked for again", path, damaged)
        for entry in entries:
            verdict = Verdict(**entry)
            self._found[verdict.key] = verdict

    def get(self, key: str) -> Verdict | None:
        """Return the verdict with scores for this key; one without is worth asking again."""
        verdict = self._found.get(key)
        return verdict if verdict is not None and verdict.scores is not None else None

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict; raises StorageError where it cannot be written."""
        line = sealed(asdict(verdict), _NAME)
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    # After a torn line a fresh one must not be glued to it.
                    file.write(line if self._ends_whole() else "\n" + line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise StorageError(f"{self.path}: cannot write: {error.strerror}; free space") from error
            self._found[verdict.key] = verdict

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n") if self.path.is_file() else []

    def _ends_whole(self) -> bool:
        size = self.path.stat().st_size
        if size == 0:
            return True
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"


def verdict_key(model: str, messages: list[dict[str, str]]) -> str:
    """Return the SHA-256 of all that determines a verdict: the model and the whole request."""
    text = json.dumps([model, messages, "scores as shown"], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
