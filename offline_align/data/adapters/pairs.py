"""Preference pairs whose sides are messages, or whose prompt has another name: TRL, UltraFeedback, DPO sets."""

from typing import Any

from offline_align.config.sections import PrepareSection
from offline_align.data.adapters.columns import DroppedRow, further, is_blank, number, optional_text
from offline_align.data.adapters.dialogues import DIALOGUES, prompt_messages
from offline_align.data.adapters.messages import Messages, contents, is_dialogue, text_or_messages, with_system
from offline_align.data.jsonl import RowError

PROMPTS = ("prompt", "question", "instruction", *DIALOGUES)
"""Columns that may hold the prompt of a pair."""
SIDES = ("chosen", "rejected")
_RATINGS = ("score", "rating", "reward")


def pair(columns: dict[str, Any], settings: PrepareSection) -> list[dict[str, Any]]:
    """Return the pair of a row. The prompt is in a column of its own, or the two sides begin with it.

    Raises DroppedRow if the sides differ before the last answer.
    """
    chosen, rejected = (_side(columns, side) for side in SIDES)
    if chosen[:-1] != rejected[:-1]:
        raise DroppedRow("the sides differ before the last answer")
    if (chosen[-1]["role"], rejected[-1]["role"]) != ("assistant", "assistant"):
        raise DroppedRow("the last turn is not an answer")
    name = next((name for name in PROMPTS if not is_blank(columns.get(name)) and _is_prompt(columns, name)), None)
    read = (*filter(None, [name]), *(["input"] if name == "instruction" else []), "system", *SIDES)
    prompt = _prompt(columns, name, chosen[:-1])
    if not prompt:
        raise RowError("prompt: missing; the sides do not begin with it either")
    rest = further(columns, read, [*contents(chosen), *contents(rejected), *contents(prompt)])
    answers = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return [{"prompt": with_system(prompt, columns), **answers, **rest}]


def _side(columns: dict[str, Any], name: str) -> Messages:
    if is_blank(columns.get(name)):
        raise DroppedRow(f"{name}: empty")
    found = text_or_messages(columns[name], name, "assistant")
    if not found:
        raise DroppedRow(f"{name}: empty")
    return found


def _is_prompt(columns: dict[str, Any], name: str) -> bool:
    """Return whether a column is the prompt, and not a copy of a side."""
    return name not in DIALOGUES or all(columns[name] != columns[side] for side in SIDES)


def _prompt(columns: dict[str, Any], name: str | None, context: Messages) -> Messages:
    """Return the prompt: the `context` with which the sides begin, a column, or one after the other."""
    if name is None:
        return context
    given = prompt_messages(columns[name], name)
    if name == "instruction" and (text := optional_text(columns, "input")):
        given[-1]["content"] = f"{given[-1]['content']}\n\n{text}"
    if not any(message["role"] == "user" for message in context):
        return [*given, *context]
    if not {*contents(given)} <= {*contents(context)} | {optional_text(columns, "system")}:
        raise RowError(f"{name}: is not the beginning of chosen")
    leads = given[0]["role"] == "system" and context[0]["role"] != "system"
    return [given[0], *context] if leads else context


def margin(columns: dict[str, Any]) -> dict[str, float]:
    """Return the margin that two ratings of the sides give; {} if there are none, or if the row has a margin.

    The ratings may be called `score_chosen` and `score_rejected`, for example. Raises DroppedRow if
    they contradict the preference.
    """
    scores = side_scores(columns)
    if scores is None or not is_blank(columns.get("margin")):
        return {}
    if scores[0] < scores[1]:
        raise DroppedRow("the rejected answer has the higher rating")
    return {"margin": scores[0] - scores[1]}


def side_scores(columns: dict[str, Any]) -> tuple[float, float] | None:
    """Return the ratings of the chosen and the rejected answer, or None if there are none."""
    for name, value in columns.items():
        if "chosen" not in name or not any(word in name for word in _RATINGS):
            continue
        chosen, rejected = number(value), number(columns.get(name.replace("chosen", "rejected")))
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def has_dialogues(columns: dict[str, Any]) -> bool:
    """Return whether a side or the prompt of a pair is not plain, so that it is read here."""
    return any(is_dialogue(columns.get(side)) for side in SIDES)
