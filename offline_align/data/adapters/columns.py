"""Helpers for all adapters: typed access to columns, and exceptions for rows that are left out."""

from collections.abc import Sequence
from typing import Any

from offline_align.data.jsonl import RowError

PROMPT_NAMES = (
    *("prompt", "instruction", "input", "inputs", "context", "question", "query", "text", "transcript"),
    *("system", "system_prompt", "history", "messages", "conversation", "conversations", "instances"),
)
ANSWER_NAMES = (
    *("response", "responses", "output", "outputs", "completion", "target", "targets", "answer", "answers"),
    *("chosen", "rejected"),
)
TEXTS = frozenset((*PROMPT_NAMES, *ANSWER_NAMES))
"""Column names under which published data sets store prompts and answers."""
COPIES = ("text", "prompt")
"""Columns in which Alpaca-like data sets repeat the whole row, formatted for training."""


class DroppedRow(Exception):
    """A well-formed row with nothing to learn from; the message is the reason under which it is counted."""


def text_column(columns: dict[str, Any], name: str) -> str:
    """Return a string column, stripped; raises RowError if it is missing or not a string."""
    if name not in columns:
        raise RowError(f"{name}: missing")
    if not isinstance(columns[name], str):
        raise RowError(f"{name}: not a string")
    return str(columns[name]).strip()


def is_blank(value: Any) -> bool:
    """Return whether a value is blank: null, white space, or an empty list or object."""
    return value.isspace() or not value if isinstance(value, str) else value in (None, [], {})


def optional_text(columns: dict[str, Any], name: str) -> str:
    """Return a string column, or "" if it is missing or blank; raises RowError if it is not a string."""
    return "" if is_blank(columns.get(name)) else text_column(columns, name)


def without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return all columns except those named."""
    return {name: value for name, value in columns.items() if name not in names}


def further(columns: dict[str, Any], read: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Return the columns that an adapter did not read and that are kept unchanged.

    A column named in `TEXTS` may belong to the prompt or the answer. It is left out if it is blank,
    or if it is one of `COPIES` and contains all `texts` of the row. Otherwise RowError is raised.
    """
    rest = without(columns, *read)
    for name in TEXTS & rest.keys():
        value = rest.pop(name)
        repeats = name in COPIES and isinstance(value, str) and all(text in value for text in texts)
        if not is_blank(value) and not repeats:
            raise RowError(f"{name}: may belong to the prompt or the answer, but only {', '.join(read)} are read")
    return rest
