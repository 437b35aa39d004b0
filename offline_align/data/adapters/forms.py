"""The known forms, one record each: the columns that identify it, and the function that converts a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from offline_align.config.sections import PrepareSection
from offline_align.data.adapters.columns import is_blank, refuse_unsupported
from offline_align.data.adapters.dialogues import DIALOGUES, completion, dialogue, plain_text
from offline_align.data.adapters.hh import hh
from offline_align.data.adapters.instructions import alpaca, dolly, flan, seed_task
from offline_align.data.adapters.messages import is_dialogue, is_plain
from offline_align.data.adapters.pairs import PROMPTS, SIDES, has_dialogues, pair
from offline_align.data.adapters.ranked import CONTAINERS, is_ranked, ranked
from offline_align.data.adapters.ratings import verdict
from offline_align.data.adapters.unknown import UnknownForm, unknown
from offline_align.data.jsonl import RowError
from offline_align.data.records import PreferencePair, Sample

type Adapter = Callable[[dict[str, Any], PrepareSection], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Form:
    """One form of rows; a published data set may have several forms, which share its `name`."""

    name: str
    """The value of `prepare.format`."""
    signs: tuple[frozenset[str], ...]
    """Sets of columns, any of which identifies the form; `prompt.x` is the key `x` of a prompt object."""
    reads: tuple[str, ...]
    """Columns that become prompt, answer or id."""
    adapt: Adapter | None = None
    """Converts a row to our rows; None for our own forms and for oasst1, which needs all rows at once."""
    own: type[Sample] | type[PreferencePair] | None = None
    """The class of our own rows."""
    fits: Callable[[dict[str, Any]], bool] | None = None
    """Tells forms with equal columns apart by their values."""
    older_name: str | None = None
    """Another value of `prepare.format` for this form."""
    many: bool = False
    """Whether a row holds several rated answers."""


def _signs(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in alternatives)


def _texts(adapt: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Adapter:
    """Return an adapter that needs no settings."""
    return lambda columns, settings: adapt(columns)


def _is_judged(columns: dict[str, Any]) -> bool:
    return verdict(columns) is not None


def _is_own(columns: dict[str, Any]) -> bool:
    return is_plain(columns.get("prompt")) and not is_dialogue(columns.get("response"))


def _is_own_pair(columns: dict[str, Any]) -> bool:
    return is_plain(columns.get("prompt")) and not has_dialogues(columns)


_TREE = ("message_id", "parent_id", "text", "role", "rank", "lang", "tree_state", "prompt")
_REFUSED = ("deleted", "synthetic", "review_result")
_SYSTEM = ("system", "history")

# The first form that matches is used.
KNOWN = (
    Form("oasst1", _signs("message_id text role", "prompt.message_id"), (*_TREE, *_REFUSED)),
    Form(
        "ranked",
        _signs(*(f"{prompt} {answers}" for prompt in ("prompt", "instruction", "question") for answers in CONTAINERS)),
        ("prompt", "instruction", "question", *CONTAINERS, "system"),
        ranked,
        fits=is_ranked,
        many=True,
    ),
    Form(
        "preference",
        _signs("prompt chosen", "prompt rejected"),
        ("prompt", *SIDES),
        own=PreferencePair,
        fits=_is_own_pair,
    ),
    Form(
        "pair",
        _signs(*(f"{prompt} {side}" for prompt in PROMPTS for side in SIDES)),
        (*PROMPTS, "input", "system", *SIDES),
        pair,
    ),
    Form("pair", _signs(*SIDES), (*PROMPTS, "system", *SIDES), pair, fits=has_dialogues),
    Form("hh", _signs("chosen", "rejected"), SIDES, _texts(hh)),
    Form("kto", _signs("prompt completion label"), ("prompt", "completion", "system"), completion, fits=_is_judged),
    Form("helpsteer2", _signs("prompt response helpfulness"), ("prompt", "response"), own=Sample, fits=_is_own),
    Form("sft", _signs("prompt response"), ("prompt", "response"), own=Sample, fits=_is_own),
    Form("prompt_completion", _signs("prompt response"), ("prompt", "response", "system"), completion),
    Form(
        "dolly",
        _signs("instruction response"),
        ("instruction", "context", "input", "response", *_SYSTEM),
        _texts(dolly),
    ),
    Form("flan", _signs("inputs targets"), ("inputs", "targets", *_SYSTEM), _texts(flan)),
    Form("self_instruct", _signs("instruction instances"), ("instruction", "instances"), _texts(seed_task)),
    Form(
        "alpaca",
        _signs("instruction output"),
        ("instruction", "input", "output", *_SYSTEM),
        _texts(alpaca),
        older_name="self_instruct",
    ),
    Form(
        "prompt_completion",
        _signs("prompt completion"),
        ("prompt", "completion", "system"),
        completion,
        older_name="self_instruct",
    ),
    Form("messages", _signs("messages"), ("messages", "system"), dialogue),
    Form("sharegpt", _signs("conversations", "conversation"), (*DIALOGUES, "system"), dialogue),
    Form("text", _signs("text"), ("text", "system"), plain_text),
)
FORMS = tuple(dict.fromkeys(form.name for form in KNOWN))


def recognise(columns: dict[str, Any], name: str | None = None, named: Mapping[str, Any] | None = None) -> Form:
    """Return the form of a row, among those called `name` if given.

    Blank columns count only if the other columns match no form, because in a table with several
    forms each row has all columns. Raises UnknownForm if no form matches, and RowError, by name, for
    tool calls and images. `named` is `prepare.columns`, for the message.
    """
    refuse_unsupported(columns)
    for blanks in (False, True):
        for form in _matching(_names(columns, blanks), name):
            if form.fits is None or form.fits(columns):
                return form
    candidates = _forms_named(name)
    if name is not None and len(candidates) == 1:
        return candidates[0]  # its adapter reports what is missing
    if name is None:
        raise UnknownForm(unknown(columns, _NEAREST, named or {}))
    needed = " or ".join("+".join(sorted(sign)) for form in candidates for sign in form.signs)
    raise RowError(f"columns: not of the form {name}, which has {needed}")


# Among which the nearest form is looked for, the first of equally near ones: our own forms, then others. `pair` and
# oasst1 have signs that a file comes near to by chance.
_NEAREST = [(form.name, frozenset(form.reads)) for form in KNOWN if form.name in ("sft", "preference")]
_NEAREST.sort(reverse=True)
_NEAREST += [(f.name, sign) for f in KNOWN if f.own is None and f.name not in ("oasst1", "pair") for sign in f.signs]


def _forms_named(name: str | None) -> list[Form]:
    return [form for form in KNOWN if name in (None, form.name, form.older_name)]


@lru_cache  # rows of a data set have few different sets of columns
def _matching(names: frozenset[str], name: str | None) -> list[Form]:
    return [form for form in _forms_named(name) if any(sign <= names for sign in form.signs)]


def _names(columns: dict[str, Any], blanks: bool) -> frozenset[str]:
    names = frozenset(name for name, value in columns.items() if blanks or not is_blank(value))
    prompt = columns.get("prompt")
    return names | {f"prompt.{key}" for key in prompt} if isinstance(prompt, dict) else names
