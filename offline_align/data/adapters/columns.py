"""Helpers for all adapters: typed access to columns, and exceptions for rows that are left out."""

import json
import math
from collections.abc import Mapping, Sequence
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
_UNSUPPORTED = {
    "tool calls": ("tools", "functions", "tool_calls", "function_call"),
    "images, sound and video": ("image", "images", "audio", "audios", "video", "videos"),
}
"""Columns whose rows no stage can learn from, by what they hold."""
_UNSUPPORTED_NAMES = frozenset(name for names in _UNSUPPORTED.values() for name in names)


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


def renamed(columns: dict[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns under the names of `prepare.columns`, which maps our names to those of the input.

    A name that a row lacks changes nothing.
    """
    if not names:
        return columns
    known = {ours: theirs for ours, theirs in names.items() if theirs in columns}
    return without(columns, *known.values()) | {ours: columns[theirs] for ours, theirs in known.items()}


def refuse_unsupported(columns: Mapping[str, Any]) -> None:
    """Raise RowError if a column holds tool calls, images, sound or video."""
    for name in _UNSUPPORTED_NAMES & columns.keys():
        if not is_blank(columns[name]):
            what = next(what for what, names in _UNSUPPORTED.items() if name in names)
            raise RowError(f"{name}: {what} are not supported")


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Return a list of objects, given as such, as an object of lists of equal length, or as JSON text.

    `datasets` returns a list of objects as an object of lists. Raises RowError for anything else.
    """
    value = parsed(value)
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        try:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        except ValueError as error:
            raise RowError(f"{name}: its lists differ in length") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{name}: not a list of objects")
    return value


def parsed(value: Any) -> Any:
    """Return a list or an object that is stored as JSON text; anything else as it is.

    Only for columns that never hold text: a prompt or an answer may be JSON.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def number(value: Any) -> float | None:
    """Return a finite number, also from the text of a table; None for anything else, such as a bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def further(columns: dict[str, Any], read: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
    """Return the columns that an adapter did not read and that are kept unchanged.

    A column named in `TEXTS` may belong to the prompt or the answer. It is left out if it is blank,
    if it only repeats some of the `texts` of the row, or if it is one of `COPIES` and contains all
    of them. Otherwise RowError is raised.
    """
    rest = without(columns, *read)
    for name in TEXTS & rest.keys():
        value = rest.pop(name)
        copies = name in COPIES and isinstance(value, str) and all(text in value for text in texts)
        if not (is_blank(value) or copies or _repeats(value, texts)):
            raise RowError(f"{name}: may belong to the prompt or the answer, but only {', '.join(read)} are read")
    return rest


def _repeats(value: Any, texts: Sequence[str]) -> bool:
    """Return whether a text, or every text in a list of messages, is one of `texts`."""
    if isinstance(value, list):
        return all(isinstance(item, dict) and _repeats(item.get("content", item.get("value")), texts) for item in value)
    return isinstance(value, str) and value.strip() in texts
