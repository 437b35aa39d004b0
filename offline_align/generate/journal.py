"""Answers as they come, one append-only file for each rank, so that an interrupted run goes on where it was.

Answers are known by prompt and sample, not by rank: a run may go on with another number of ranks. The folder
of the journal is named after the content key of the run, so answers of other settings are never taken over.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offline_align.data.records import Prompt, write_jsonl
from offline_align.errors import StorageError
from offline_align.generate.requests import Completion, Request

Place = tuple[int, int, int]
"""Prompt, condition and sample that an answer belongs to, counted from 0."""


class Journal:
    """The answers of one run so far; a rank appends to its own file and reads those of all."""

    def __init__(self, run_dir: Path, key: str, rank: int) -> None:
        self.folder = run_dir / "journal" / key[:16]
        self.path = self.folder / f"generations.rank_{rank:04d}.jsonl"

    def read(self) -> dict[Place, Completion]:
        """Return all answers of all ranks; a torn last line, cut off by a crash, counts as not there."""
        try:
            files = sorted(self.folder.glob("generations.rank_*.jsonl"))
            return {_place(answer): answer for file in files for answer in _answers(file)}
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be read: {error.strerror}") from error

    def start(self) -> None:
        """Make this rank's file ready for `append`: a torn last line is cut off."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def append(self, answers: Iterable[Completion]) -> None:
        """Add answers; they are on disk when this returns. Raises StorageError."""
        text = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        try:
            with self.path.open("a", encoding="utf-8", newline="\n", errors="surrogatepass") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Delete the journal, once its answers stand in the output."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def _place(one: Completion | Request) -> Place:
    return one.row, one.variant, one.sample_index


def _answers(file: Path) -> Iterator[Completion]:
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            yield Completion(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{file}: is damaged ({error}); delete it, its answers are made again") from error


def missing(requests: Sequence[Request], done: dict[Place, Completion]) -> list[Request]:
    """Return the requests without an answer."""
    return [request for request in requests if _place(request) not in done]


def merge(
    path: Path,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    done: dict[Place, Completion],
    conditions: Sequence[str],
) -> int:
    """Write every answer beside the columns of its prompt, in the order of the input; return the rows.

    Raises StorageError where answers and requests are not the same set.
    """
    expected = {_place(request) for request in requests}
    if expected != done.keys():
        absent, foreign = len(expected - done.keys()), len(done.keys() - expected)
        raise StorageError(
            f"{path}: {absent} answers are missing and {foreign} belong to other prompts; "
            "run the stage again in an empty folder"
        )
    several = any(request.sample_index for request in requests)
    rows = (_row(prompts[row], done[row, v, k], conditions[v], several) for row, v, k in sorted(expected))
    return write_jsonl(path, rows)


def _row(prompt: Prompt, answer: Completion, condition: str, several: bool) -> dict[str, Any]:
    row = {"id": "", **prompt.columns} | {"id": prompt.id}
    row |= {
        "response": answer.response,
        "finish_reason": answer.finish_reason,
        "condition": condition or None,
    }
    return row | ({"sample_index": answer.sample_index} if several else {})
