"""Say what is missing in rows of no known form, and which key helps."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from offline_align.data.jsonl import RowError

_SYNONYMS = {
    "prompt": ("question", "instruction", "query", "input", "inputs", "user", "human", "problem", "source", "title"),
    "response": ("answer", "output", "completion", "target", "targets", "reply", "assistant", "solution", "text"),
    "chosen": ("preferred", "better", "winner", "accepted", "positive", "good", "best"),
    "rejected": ("dispreferred", "worse", "loser", "refused", "negative", "bad", "worst"),
}
_SHOWN_COLUMNS = 12
_SHOWN_CHARACTERS = 40


class UnknownForm(RowError):
    """A row of no known form. It is no reason to skip rows: the file as a whole is not understood."""


def unknown(columns: Mapping[str, Any], signs: Sequence[tuple[str, frozenset[str]]], named: Mapping[str, Any]) -> str:
    """Return which columns there are, the nearest form, what it lacks, and the key that names columns.

    `signs` are the names of forms, with the columns that identify each; `named` is `prepare.columns`.
    """
    names = [name for name in columns if not name.startswith("prompt.")]
    form, sign = max(signs, key=lambda entry: _nearness(names, entry[1]))
    missing = sorted(sign - {*names})
    guesses = {name: _guess(name, names) or "<column>" for name in missing}
    asked = ", ".join(f"{ours}: {theirs}" for ours, theirs in guesses.items())
    absent = [str(theirs) for theirs in named.values() if theirs not in columns and theirs not in named]
    note = f"; prepare.columns names {', '.join(absent)}, which the row lacks" if absent else ""
    return (
        f"columns: no known form; the row has {_listed(names)}; the nearest form is {form}, which lacks "
        f"{', '.join(missing)}; name the columns, as in prepare.columns='{{{asked}}}'{note}"
    )


def _nearness(names: Sequence[str], sign: frozenset[str]) -> tuple[float, int]:
    found = sum(1.0 if name in names else 0.9 if _guess(name, names) else 0.0 for name in sign)
    return found / len(sign), -len(sign)


def _guess(name: str, names: Sequence[str]) -> str | None:
    """Return the column that may hold what a form calls `name`, by synonyms and by spelling."""
    lower = {other.lower(): other for other in names}
    synonym = next((lower[word] for word in _SYNONYMS.get(name, ()) if word in lower), None)
    close = get_close_matches(name, lower, n=1, cutoff=0.75)
    return synonym or (lower[close[0]] if close else None)


def _listed(names: Sequence[str]) -> str:
    shown = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..." for name in names]
    more = f" and {len(shown) - _SHOWN_COLUMNS} more" if len(shown) > _SHOWN_COLUMNS else ""
    return (", ".join(shown[:_SHOWN_COLUMNS]) or "no column with content") + more
