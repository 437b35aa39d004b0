"""What all adapters share: typed access to columns, and the ways to leave a row out."""

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
"""The names under which published sets keep prompts and answers."""
COPIES = ("text", "prompt")
"""Columns in which sets of Alpaca's form repeat a whole row, formatted for training."""


class DroppedRow(Exception):
    """A well-formed row that gives nothing to learn from; the message is the reason that is counted."""


def text_column(columns: dict[str, Any], name: str) -> str:
    """Return a string column without white space at its ends; RowError if it is missing or no string."""
    if name not in columns:
        raise RowError(f"{name}: missing")
    if not isinstance(columns[name], str):
        raise RowError(f"{name}: not a string")
    return str(columns[name]).strip()


def is_blank(value: Any) -> bool:
    """Return whether a column holds nothing: null, white space, or an empty list or object."""
    return value.isspace() or not value if isinstance(value, str) else value in (None, [], {})


def optional_text(columns: dict[str, Any], name: str) -> str:
    """Return a string column, or nothing if it is absent or blank; RowError if it is no string."""
    return "" if is_blank(columns.get(name)) else text_column(columns, name)


def without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the columns but for those named."""
    return {name: value for name, value in columns.items() if name not in names}


def further(columns: dict[str, Any], read: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Return the columns that an adapter has not read and that are kept as they are.

    A column with a name of `TEXTS` may belong to the prompt or the answer. It is left out if it is blank, or if it is
    one of `COPIES` and has all `texts` of the row in it. RowError otherwise.
    """
    rest = without(columns, *read)
    for name in TEXTS & rest.keys():
        value = rest.pop(name)
        repeats = name in COPIES and isinstance(value, str) and all(text in value for text in texts)
        if not is_blank(value) and not repeats:
            raise RowError(f"{name}: may belong to the prompt or the answer, but is not read beside {', '.join(read)}")
    return rest
