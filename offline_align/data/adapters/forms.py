"""The known forms, one record each: the columns that identify it, and the function that converts a row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from offline_align.data.adapters.columns import is_blank
from offline_align.data.adapters.hh import hh
from offline_align.data.adapters.instructions import completion, dolly, flan, seed_task, self_instruct
from offline_align.data.jsonl import RowError
from offline_align.data.records import PreferencePair, Sample


@dataclass(frozen=True, slots=True)
class Form:
    """One form of rows; a published data set may have several forms, which share its `name`."""

    name: str
    """The value of `prepare.format`."""
    signs: tuple[frozenset[str], ...]
    """Sets of columns, any of which identifies the form; `prompt.x` is the key `x` of a prompt object."""
    reads: tuple[str, ...]
    """Columns that become prompt, answer or id."""
    adapt: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None
    """Converts a row to our rows; None for our own forms and for oasst1, which needs all rows at once."""
    own: type[Sample] | type[PreferencePair] | None = None
    """The class of our own rows."""


def _signs(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


_TREE = ("message_id", "parent_id", "text", "role", "rank", "lang", "tree_state", "prompt")
_REFUSED = ("deleted", "synthetic", "review_result")

_PAIR = ("prompt", "chosen", "rejected")

# The first form that matches is used.
KNOWN = (
    Form("oasst1", _signs("message_id text role", "prompt.message_id"), (*_TREE, *_REFUSED)),
    Form("preference", _signs("prompt chosen", "prompt rejected"), _PAIR, own=PreferencePair),
    Form("hh", _signs("chosen", "rejected"), ("chosen", "rejected"), hh),
    Form("sft", _signs("prompt response"), ("prompt", "response"), own=Sample),
    Form("dolly", _signs("instruction response"), ("instruction", "context", "input", "response"), dolly),
    Form("flan", _signs("inputs targets"), ("inputs", "targets"), flan),
    Form("self_instruct", _signs("instruction instances"), ("instruction", "instances"), seed_task),
    Form("self_instruct", _signs("instruction output"), ("instruction", "input", "output"), self_instruct),
    Form("self_instruct", _signs("prompt completion"), ("prompt", "completion"), completion),
)
FORMS = tuple(dict.fromkeys(form.name for form in KNOWN))


def recognise(columns: dict[str, Any], name: str | None = None) -> Form:
    """Return the form of a row, among those called `name` if given; raises RowError if none matches.

    Blank columns count only if the other columns match no form, because in a table with several
    forms each row has all columns.
    """
    for blanks in (False, True):
        form = _first(_names(columns, blanks), name)
        if form is not None:
            return form
    candidates = _forms_named(name)
    if name is not None and len(candidates) == 1:
        return candidates[0]  # its adapter reports what is missing
    needed = " or ".join("+".join(sorted(sign)) for form in candidates for sign in form.signs)
    known = f"no known form; prepare.format takes {', '.join(FORMS)}"
    raise RowError(f"columns: {known if name is None else f'not of the form {name}, which has {needed}'}")


def _forms_named(name: str | None) -> list[Form]:
    return [form for form in KNOWN if name in (None, form.name)]


@lru_cache  # rows of a data set have few different sets of columns
def _first(names: frozenset[str], name: str | None) -> Form | None:
    return next((form for form in _forms_named(name) if any(sign <= names for sign in form.signs)), None)


def _names(columns: dict[str, Any], blanks: bool) -> frozenset[str]:
    names = frozenset(name for name, value in columns.items() if blanks or not is_blank(value))
    prompt = columns.get("prompt")
    return names | {f"prompt.{key}" for key in prompt} if isinstance(prompt, dict) else names
