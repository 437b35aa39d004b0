"""Single-turn instruction sets: Dolly 15k, Flan v2 and Self-Instruct; one row gives one or more of ours."""

from typing import Any

from offline_align.data.adapters.columns import optional_text, text_column, without
from offline_align.data.jsonl import RowError

END_OF_TEXT = "<|endoftext|>"


def dolly(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of Dolly's `instruction`, `context`, `response`, `category`."""
    prompt = _joined(text_column(columns, "instruction"), optional_text(columns, "context"))
    rest = without(columns, "instruction", "context", "response")
    return [{"prompt": prompt, "response": text_column(columns, "response"), **rest}]


def flan(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row of Flan v2's `inputs` and `targets`."""
    rest = without(columns, "inputs", "targets")
    return [{"prompt": text_column(columns, "inputs"), "response": text_column(columns, "targets"), **rest}]


def self_instruct(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a seed task (`instruction`, `instances`), or of one `prompt` and `completion`."""
    if "instances" in columns:
        return _seed_task(columns)
    prompt = text_column(columns, "prompt").removeprefix("Task:").removesuffix("Output:")
    completion = text_column(columns, "completion").removesuffix(END_OF_TEXT)
    return [{"prompt": prompt.strip(), "response": completion.strip()}]


def _seed_task(columns: dict[str, Any]) -> list[dict[str, Any]]:
    instruction, instances = text_column(columns, "instruction"), columns["instances"]
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise RowError("instances: not a list of objects")
    rest = without(columns, "id", "instruction", "instances")
    return [
        {
            "prompt": _joined(instruction, optional_text(instance, "input")),
            "response": text_column(instance, "output"),
            **rest,
        }
        for instance in instances
    ]


def _joined(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context else instruction
