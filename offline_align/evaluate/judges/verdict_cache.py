"""Keep a served judge's verdicts in `verdicts.jsonl`, so no question is paid for twice."""

import contextlib
import hashlib
import json
import logging
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from offline_align.data.journal import JournalFile
from offline_align.wording import counted

logger = logging.getLogger(__name__)
# Part of every checksum. It is constant: a verdict depends on the request, not on the run.
_NAME = "verdicts"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The scores of answers in the order shown, None if no reply could be read.

    `reply` is the last reply, or the server's message if it refused the question. `problem` says in
    a few words why there are no scores.
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
    """Verdicts by the hash of model and request; threads may share one cache."""

    def __init__(self, path: Path) -> None:
        """Read the file, skipping lines that are damaged or of another version.

        Raises StorageError if it cannot be read.
        """
        self._file = JournalFile(path, _NAME)
        self._lock = threading.Lock()
        self._found: dict[str, Verdict] = {}
        entries = self._file.read()
        for entry in entries:
            # Another version of this program may have written other fields.
            with contextlib.suppress(TypeError):
                self._found[entry["key"]] = Verdict(**entry)
        known = {field.name for field in fields(Verdict)}
        if other := sum(not entry.keys() <= known for entry in entries):
            logger.warning("%s: %s of another version: asked again", path, counted(other, "verdict"))

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def get(self, key: str) -> Verdict | None:
        """Return the verdict with this key, or None if it is missing or has no scores."""
        verdict = self._found.get(key)
        return verdict if verdict is not None and verdict.scores is not None else None

    def add(self, verdict: Verdict) -> None:
        """Store a verdict; it is on disk when this returns. Raises StorageError."""
        with self._lock:
            self._file.append([asdict(verdict)])
            self._found[verdict.key] = verdict


def verdict_key(model: str, messages: list[dict[str, str]]) -> str:
    """Return the SHA-256 of everything that determines a verdict: the model and the request."""
    text = json.dumps([model, messages, "scores as shown"], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
