"""Store answers in the journal of a run, and merge them into its output.

An answer is identified by prompt, condition and sample, not by rank, so a run can continue with
another number of ranks.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offline_align.data.journal import Journal
from offline_align.data.records import Prompt, write_jsonl
from offline_align.errors import StorageError
from offline_align.generate.requests import Completion, Request

OF_OTHER_ANSWERS = ("chosen", "rejected", "reward", "reward_raw")
"""Columns of a pair or a labelled row that do not hold for a new answer. With them, later stages would
take the row for a pair, or the reward for that of the new answer."""

Place = tuple[int, int, int]
"""Prompt, condition and sample of an answer, each counted from 0."""


def read_answers(journal: Journal, requests: Sequence[Request]) -> dict[Place, Completion]:
    """Return the answers to `requests` in the journal files of all ranks; raises StorageError."""
    expected = {_place(request) for request in requests}
    answers = (_completion(entry) for entry in journal.read())
    return {place: answer for answer in answers if (place := _place(answer)) in expected}


def append_answers(journal: Journal, answers: Iterable[Completion]) -> None:
    """Append answers; they are on disk when this returns. Raises StorageError."""
    journal.append(map(_entry, answers))


# Token details are in the journal of a rollout alone.
_DETAILS = ("token_ids", "log_probs")


def _entry(answer: Completion) -> dict[str, Any]:
    return {name: value for name, value in asdict(answer).items() if value or name not in _DETAILS}


def _completion(entry: dict[str, Any]) -> Completion:
    return Completion(**entry | {name: tuple(entry.get(name, ())) for name in _DETAILS})


def _place(one: Completion | Request) -> Place:
    return one.row, one.variant, one.sample_index


def missing(requests: Sequence[Request], done: Collection[Place]) -> list[Request]:
    """Return the requests without an answer."""
    return [request for request in requests if _place(request) not in done]


def merge(
    path: Path,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    done: dict[Place, Completion],
    conditions: Sequence[str],
) -> int:
    """Write every answer with the columns of its prompt, in input order; return the number of rows.

    Columns in `OF_OTHER_ANSWERS` are left out. Raises StorageError if the answers do not match the
    requests one to one.
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
    row = {"id": "", **{k: v for k, v in prompt.columns.items() if k not in OF_OTHER_ANSWERS}} | {"id": prompt.id}
    row |= {
        "response": answer.response,
        "finish_reason": answer.finish_reason,
        "condition": condition or None,
    }
    return row | ({"sample_index": answer.sample_index} if several else {})
