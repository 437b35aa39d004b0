"""The README.md of an exported folder: what the model is, how to use it, and what it was made from."""

from collections.abc import Sequence

from offline_align.convert.provenance import Evaluation, Provenance, Rows
from offline_align.data.condition import Condition
from offline_align.model.description import ModelDescription


def model_card(description: ModelDescription, notes: list[str], known: Provenance, recipe: str = "") -> str:
    """Return the text of README.md.

    `recipe` is code that encodes dialogues as in training; it is empty if `apply_chat_template` does so.
    """
    method = known.method or description.method or "no training: converted weights"
    task = "text-generation" if description.kind == "policy" else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [alignment, offline-align]"]
    lines += ["---", "", "# Model card", "", f"Made by offline-align: {method}.", ""]
    lines += _policy_usage(description.condition, recipe) if description.kind == "policy" else _reward_usage(recipe)
    lines += [f"- {note}" for note in notes]
    lines += _facts("Training", known.training) + _facts("Reward model behind the labels", known.reward_model)
    lines += _evaluation(known.evaluation) if known.evaluation else []
    lines += ["", "## Made from", "", *(known.runs or ["No record of earlier runs came with the weights."])]
    if known.runs:
        lines += ["", "`manifest.json` names every file of this folder, and the runs before it, with SHA-256."]
    return "\n".join(lines) + "\n"


def _facts(title: str, rows: Rows) -> list[str]:
    return ["", f"## {title}", "", *_table(["", ""], rows)] if rows else []


def _evaluation(found: Evaluation) -> list[str]:
    """Return the comparison of methods, with the names of this model in bold."""
    rows = [[f"**{row[0]}**" if row[0] in found.own else row[0], *row[1:]] for row in found.rows]
    text = f"Judged by {found.judge} on {found.prompts} prompts, 95 % intervals; this model in bold."
    return ["", "## Evaluation", "", text, "", *_table(found.header, rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _policy_usage(condition: Condition | None, recipe: str) -> list[str]:
    call = "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`"
    usage = ["## Asking it", "", *_encoding(call, "prompt", recipe, "prompt_ids")]
    return [*usage, f"- {condition.meaning}"] if condition else usage


def _reward_usage(recipe: str) -> list[str]:
    call = "`tokenizer.apply_chat_template(messages)` with the answer as the last message"
    return [
        "## Scoring with it",
        "",
        "`AutoModelForSequenceClassification` gives one logit, the reward of the last answer.",
        "",
        *_encoding(call, "row", recipe, "row_ids"),
        "- The head is kept in fp32; load with `dtype=torch.float32` for scores equal to those of training.",
    ]


def _encoding(call: str, what: str, recipe: str, function: str) -> list[str]:
    """Return the usage text: how to encode a prompt or row (`what`) as in training."""
    if not recipe:
        return [f"{call} gives the tokens that the model was trained with.", ""]
    return [
        f"{call} gives the text of the {what}. In training, its parts were encoded separately; a tokenizer that "
        f"gets the whole text can join some of them. `{function}(messages)` gives the tokens of training:",
        "",
        "```python",
        recipe,
        "```",
        "",
    ]
