"""The README.md of an exported folder: what it is, how it is asked, and what it was made from."""

from pathlib import Path

from offline_align.errors import StorageError
from offline_align.lineage import read_manifest
from offline_align.model.description import ModelDescription

_METHODS = {
    "sft": "supervised fine-tuning",
    "fa": "Filtering Alignment",
    "rwr": "Reward-Weighted Regression",
    "ca": "Conditional Alignment",
    "reward": "a reward model trained on preference pairs",
}


def model_card(description: ModelDescription, condition: str, notes: list[str], ancestry: list[str]) -> str:
    """Return the text of README.md; `condition` is the reward text that generation uses, or empty."""
    method = _METHODS.get(description.method, description.method or "no training: converted weights")
    task = "text-generation" if description.kind == "policy" else "text-classification"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [alignment, offline-align]"]
    lines += ["---", "", "# Model card", "", f"Made by offline-align: {method}.", ""]
    lines += _policy_usage(condition) if description.kind == "policy" else _reward_usage()
    lines += [f"- {note}" for note in notes]
    lines += ["", "## Made from", "", *(ancestry or ["No record of earlier runs came with the weights."])]
    return "\n".join(lines) + "\n"


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


def ancestry(model_folder: Path) -> list[str]:
    """Return the runs behind a checkpoint or Hugging Face folder, newest first, as nested list items."""
    folder = model_folder.resolve()
    for run_dir in (folder, *folder.parents[:2]):
        lines = _runs_behind(run_dir, 0)
        if lines:
            return lines
    return []


def _runs_behind(run_dir: Path, depth: int) -> list[str]:
    try:
        manifest = read_manifest(run_dir)
    except StorageError:
        return []
    if manifest is None:
        return []
    indent = "  " * depth
    lines = [f"{indent}- `{manifest.stage}`, {manifest.created}, key `{manifest.key[:12]}`"]
    lines += [f"{indent}  - `{Path(file.path).name}`, SHA-256 `{file.sha256[:12]}`" for file in manifest.inputs]
    for parent in manifest.parents:
        above = _runs_behind((run_dir / parent.path).resolve(), depth + 1)
        lines += above or [f"{indent}  - `{parent.stage}`, SHA-256 `{parent.manifest_sha256[:12]}`"]
    return lines
