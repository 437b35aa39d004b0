"""The README.md of an exported folder: what it is, how it is asked, and what it was made from."""

from collections.abc import Sequence

from offline_align.convert.provenance import Evaluation, Provenance, Rows
from offline_align.model.description import ModelDescription

_METHODS = {
    "sft": "supervised fine-tuning",
    "fa": "Filtering Alignment",
    "rwr": "Reward-Weighted Regression",
    "ca": "Conditional Alignment",
    "reward": "a reward model trained on preference pairs",
}


def model_card(description: ModelDescription, condition: str, notes: list[str], known: Provenance) -> str:
    """Return the text of README.md; `condition` is the reward text that generation uses, or empty."""
    method = _METHODS.get(description.method, description.method or "no training: converted weights")
    task = "text-generation" if description.kind == "policy" else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [alignment, offline-align]"]
    lines += ["---", "", "# Model card", "", f"Made by offline-align: {method}.", ""]
    lines += _policy_usage(condition) if description.kind == "policy" else _reward_usage()
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
    """Return the comparison with the names of this model in bold."""
    rows = [[f"**{row[0]}**" if row[0] in found.own else row[0], *row[1:]] for row in found.rows]
    text = f"Judged by {found.judge} on {found.prompts} prompts, 95 % intervals; this model in bold."
    return ["", "## Evaluation", "", text, "", *_table(found.header, rows)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _policy_usage(condition: str) -> list[str]:
    usage = [
        "## Asking it",
        "",
        "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` gives the prompt "
        "that the model was trained with.",
        "",
    ]
    if condition:
        usage += [
            f"- The response is conditioned on the reward: the prompt ends with `{condition}`. Write another "
            "number there to ask for another reward."
        ]
    return usage


def _reward_usage() -> list[str]:
    return [
        "## Scoring with it",
        "",
        "`AutoModelForSequenceClassification` gives one logit, the reward of the last answer, read at the "
        "end-of-sequence token that closes it: score "
        '`tokenizer.apply_chat_template(messages, return_tensors="pt")` with the answer as the last message.',
        "",
        "- The head is kept in fp32; load with `dtype=torch.float32` for scores equal to those of training.",
    ]
