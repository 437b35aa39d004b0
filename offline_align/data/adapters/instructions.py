"""Instruction sets: Dolly 15k, Flan v2, Self-Instruct and Alpaca. A row becomes one or more of ours."""

from collections.abc import Sequence
from typing import Any

from offline_align.data.adapters.columns import (
    DroppedRow,
    further,
    is_blank,
    objects,
    optional_text,
    parsed,
    text_column,
)
from offline_align.data.adapters.messages import Messages, contents, with_system
from offline_align.data.jsonl import RowError


def dolly(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of `instruction`, `response`, and Dolly's `context` or the `input` of similar sets."""
    context, text = optional_text(columns, "context"), optional_text(columns, "input")
    if context and text:
        raise RowError("input: present in addition to context; join the two")
    return [_row(columns, ("instruction", "context", "input"), "response")]


def flan(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of Flan v2's `inputs` and `targets`."""
    return [_row(columns, ("inputs",), "targets")]


def alpaca(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of `instruction`, `input`, `output`: Alpaca's, or a generated one of Self-Instruct."""
    return [_row(columns, ("instruction", "input"), "output")]


def seed_task(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each instance of a Self-Instruct seed task; raises DroppedRow if it has none."""
    instances = objects(columns["instances"], "instances")
    if not instances:
        raise DroppedRow("self_instruct: a task without an instance")
    instruction = text_column(columns, "instruction")
    rest = further(columns, ("instruction", "instances"), [instruction])
    return [_row({"instruction": instruction} | i, ("instruction", "input"), "output") | rest for i in instances]


def _row(columns: dict[str, Any], prompt: Sequence[str], response: str) -> dict[str, Any]:
    """Return the row whose prompt joins the `prompt` columns; the first of them is required.

    The prompt is a text. It becomes messages if the row has `system` or `history`, earlier turns.
    """
    parts = [text_column(columns, prompt[0]), *(optional_text(columns, name) for name in prompt[1:])]
    answer = text_column(columns, response)
    text = "\n\n".join(filter(None, parts))
    before = with_system(_history(columns), columns)
    rest = further(columns, (*prompt, response, "system", "history"), [*contents(before), *parts, answer])
    return {"prompt": [*before, {"role": "user", "content": text}] if before else text, "response": answer, **rest}


def _history(columns: dict[str, Any]) -> Messages:
    """Return earlier turns, a list of `[question, answer]`."""
    given = parsed(columns.get("history"))
    if is_blank(given):
        return []
    if not isinstance(given, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in given
    ):
        raise RowError("history: not a list of [question, answer]")
    roles = ("user", "assistant")
    return [{"role": role, "content": text.strip()} for turn in given for role, text in zip(roles, turn, strict=True)]
