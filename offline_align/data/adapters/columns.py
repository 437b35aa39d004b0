"""What all adapters share: typed access to columns, and the way to leave a row out."""

from typing import Any

from offline_align.data.jsonl import RowError


class DroppedRow(Exception):
    """A well-formed row that gives nothing to learn from; the message is the reason that is counted."""


def text_column(columns: dict[str, Any], name: str) -> str:
    """Return a string column without white space at its ends; RowError where it is missing or no string."""
    if name not in columns:
        raise RowError(f"{name}: missing")
    if not isinstance(columns[name], str):
        raise RowError(f"{name}: not a string")
    return str(columns[name]).strip()


def optional_text(columns: dict[str, Any], name: str) -> str:
    """Return a string column, or nothing where it is absent or null; RowError where it is no string."""
    return "" if columns.get(name) is None else text_column(columns, name)


def without(columns: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the columns that an adapter has not used."""
    return {name: value for name, value in columns.items() if name not in names}
