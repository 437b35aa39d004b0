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
    absent = [str(theirs) for ours, theirs in named.items() if ours not in columns]
    note = f"; prepare.columns names {', '.join(absent)}, which the row lacks" if absent else ""
    return (
        f"columns: no known form; the row has {_listed(names)}; the nearest form is {form}, which lacks "
        f"{', '.join(missing)}; name the columns, as in prepare.columns='{{{asked}}}'{note}"
    )


def _nearness(names: Sequence[str], sign: frozenset[str]) -> float:
    """Return how much of a form there is, from 0 to 1; a column of another name counts less."""
    worth = (1.0 if n in names else 0.95 if _synonym(n, names) else 0.8 if _guess(n, names) else 0.0 for n in sign)
    return sum(worth) / len(sign)


def _synonym(name: str, names: Sequence[str]) -> str | None:
    lower = {other.lower(): other for other in names}
    return next((lower[word] for word in (name, *_SYNONYMS.get(name, ())) if word in lower), None)


def _guess(name: str, names: Sequence[str]) -> str | None:
    """Return the column that may hold what a form calls `name`, by synonyms and by spelling."""
    close = get_close_matches(name, names, n=1, cutoff=0.75)
    return _synonym(name, names) or (close[0] if close else None)


def _listed(names: Sequence[str]) -> str:
    shown = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..." for name in names]
    more = f" and {len(shown) - _SHOWN_COLUMNS} more" if len(shown) > _SHOWN_COLUMNS else ""
    return (", ".join(shown[:_SHOWN_COLUMNS]) or "no column with content") + more
