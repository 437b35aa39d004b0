"""Verdicts that were paid for are never asked for again: `verdicts.jsonl` in the run folder."""

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from offline_align.errors import StorageError


@dataclass(frozen=True, slots=True)
class Verdict:
    """The scores of answers as they were shown, None where no reply could be read; `reply` is the last one."""

    key: str
    id: str
    scores: list[float] | None
    reply: str
    attempts: int
    prompt_tokens: int
    completion_tokens: int


class VerdictCache:
    """Verdicts by the hash of model and request; every new one is on disk before it counts."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that a crash tore is dropped and its verdict asked for again."""
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[str, Verdict] = {}
        for line in self._lines():
            try:
                verdict = Verdict(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self._found[verdict.key] = verdict

    def get(self, key: str) -> Verdict | None:
        """Return the verdict with scores for this key; one without is worth asking again."""
        verdict = self._found.get(key)
        return verdict if verdict is not None and verdict.scores is not None else None

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict; raises StorageError where it cannot be written."""
        line = json.dumps(asdict(verdict), ensure_ascii=False) + "\n"
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

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").split("\n")

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
