"""Several answers to a prompt in one row, with ranks (Nectar) or ratings (UltraFeedback)."""

from collections.abc import Mapping
from typing import Any

from offline_align.config.sections import PrepareSection
from offline_align.data.adapters.columns import further, is_blank, number, objects, optional_text, parsed
from offline_align.data.adapters.dialogues import prompt_messages
from offline_align.data.adapters.messages import contents, with_system
from offline_align.data.adapters.ratings import REWARD, weights
from offline_align.data.jsonl import RowError

CONTAINERS = ("answers", "completions", "responses")
"""Columns that hold the answers."""
PROMPTS = ("prompt", "instruction", "question")
_TEXTS = ("answer", "response", "text", "content", "completion")
_SCORES = ("fine-grained_score", "score", "rating", "reward", "overall_score")
_LISTS = ("scores", "ratings", "rewards", "ranks")
"""Columns with the ratings or ranks of answers that are texts."""


def is_ranked(columns: dict[str, Any]) -> bool:
    """Return whether a row holds several answers."""
    return any(isinstance(parsed(columns.get(name)), (list, dict)) for name in CONTAINERS)


def ranked(columns: dict[str, Any], settings: PrepareSection) -> list[dict[str, Any]]:
    """Return a rated row for each answer, with its rating in `reward_raw`; a rank counts negatively.

    UltraFeedback's answers are rated by their `fine-grained_score` or by the mean of their ratings,
    not by `overall_score`, which is wrong in a part of the set. Raises RowError for an answer without
    a rating.
    """
    container = next((name for name in CONTAINERS if isinstance(parsed(columns.get(name)), (list, dict))), None)
    name = next((name for name in PROMPTS if not is_blank(columns.get(name))), None)
    if name is None or container is None:
        raise RowError(f"{'prompt' if name is None else CONTAINERS[0]}: missing")
    answers = _answers(columns, container)
    prompt = with_system(prompt_messages(columns[name], name), columns)
    texts = [*contents(prompt), *(_text(answer, container) for answer in answers)]
    rest = further(columns, (name, container, "system", *_LISTS), texts)
    return [
        {"prompt": prompt, "response": _text(a, container), **rest, **_rating(a, container, settings)} for a in answers
    ]


def _answers(columns: dict[str, Any], container: str) -> list[dict[str, Any]]:
    value = parsed(columns[container])
    if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return objects(value, container)
    name = next((name for name in _LISTS if isinstance(parsed(columns.get(name)), list)), None)
    given = parsed(columns[name]) if name else []
    if name is None or len(given) != len(value):
        raise RowError(f"{container}: needs as many ratings in one of {', '.join(_LISTS)}")
    return [{"text": text, name.removesuffix("s"): rating} for text, rating in zip(value, given, strict=True)]


def _text(answer: Mapping[str, Any], container: str) -> str:
    name = next((name for name in _TEXTS if name in answer), None)
    if name is None:
        raise RowError(f"{container}: an answer has none of {', '.join(_TEXTS)}")
    return optional_text(dict(answer), name)


def _rating(answer: Mapping[str, Any], container: str, settings: PrepareSection) -> dict[str, Any]:
    model = {} if is_blank(answer.get("model")) else {"model": answer["model"]}
    wanted = weights(settings.score_column)
    if wanted:
        parts = {name: _part(answer, name) for name in wanted}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise RowError(f"{container}: an answer has no number in {missing[0]}, which prepare.score_column names")
        return model | {REWARD: sum(weight * (parts[name] or 0.0) for name, weight in wanted.items())}
    rank = number(answer.get("rank"))
    if rank is not None:
        return model | {"rank": rank, REWARD: -rank}
    scores = [number(answer.get(name)) for name in _SCORES[:1]] + [_mean_rating(answer)]
    scores += [number(answer.get(name)) for name in _SCORES[1:]]
    found = next((score for score in scores if score is not None), None)
    if found is None:
        raise RowError(f"{container}: an answer has no rank and no rating; name one with prepare.score_column")
    return model | {REWARD: found}


def _part(answer: Mapping[str, Any], name: str) -> float | None:
    """Return a rating by its name, also from UltraFeedback's `annotations`."""
    own = number(answer.get(name))
    notes = answer.get("annotations")
    return _note(notes[name]) if own is None and isinstance(notes, dict) and name in notes else own


def _mean_rating(answer: Mapping[str, Any]) -> float | None:
    notes = answer.get("annotations")
    found = [n for note in notes.values() if (n := _note(note)) is not None] if isinstance(notes, dict) else []
    return sum(found) / len(found) if found else None


def _note(note: Any) -> float | None:
    return number(note.get("Rating", note.get("rating")) if isinstance(note, dict) else note)
