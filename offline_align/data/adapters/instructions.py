"""Single-turn instruction sets: Dolly 15k, Flan v2 and Self-Instruct. A row becomes one or more of ours."""

from collections.abc import Sequence
from typing import Any

from offline_align.data.adapters.columns import DroppedRow, further, optional_text, text_column
from offline_align.data.jsonl import RowError

END_OF_TEXT = "<|endoftext|>"


def dolly(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of `instruction`, `response`, and Dolly's `context` or the `input` of similar sets."""
    context, text = optional_text(columns, "context"), optional_text(columns, "input")
    if context and text:
        raise RowError("input: present in addition to context; join the two")
    return [_row(columns, ("instruction", "context", "input"), "response")]


def flan(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of Flan v2's `inputs` and `targets`."""
    return [_row(columns, ("inputs",), "targets")]


def self_instruct(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of a generated instance: `instruction`, `input`, `output`; also Alpaca's form."""
    return [_row(columns, ("instruction", "input"), "output")]


def completion(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of Self-Instruct's `prompt` and `completion`, without the markers around them."""
    row = _row(columns, ("prompt",), "completion")
    prompt = row["prompt"].removeprefix("Task:").removesuffix("Output:")
    response = row["response"].removesuffix(END_OF_TEXT)
    return [row | {"prompt": prompt.strip(), "response": response.strip()}]


def seed_task(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each instance of a Self-Instruct seed task; raises DroppedRow if it has none."""
    instances = _instances(columns["instances"])
    if not instances:
        raise DroppedRow("self_instruct: a task without an instance")
    instruction = text_column(columns, "instruction")
    rest = further(columns, ("instruction", "instances"), [instruction])
    return [_row({"instruction": instruction} | i, ("instruction", "input"), "output") | rest for i in instances]


def _instances(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        # `datasets` returns a list of objects as an object of lists of equal length.
        try:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
        except ValueError as error:
            raise RowError("instances: its lists differ in length") from error
    if not isinstance(value, list) or not all(isinstance(instance, dict) for instance in value):
        raise RowError("instances: not a list of objects")
    return value


def _row(columns: dict[str, Any], prompt: Sequence[str], response: str) -> dict[str, Any]:
    """Return the row whose prompt joins the `prompt` columns; the first of them is required."""
    parts = [text_column(columns, prompt[0]), *(optional_text(columns, name) for name in prompt[1:])]
    answer = text_column(columns, response)
    rest = further(columns, (*prompt, response), [*parts, answer])
    return {"prompt": "\n\n".join(filter(None, parts)), "response": answer, **rest}
