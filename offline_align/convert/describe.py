"""What a folder of weights is, whichever form it has: a checkpoint of ours, or a Hugging Face folder."""

from pathlib import Path
from typing import Any

from offline_align.config.sections import Template
from offline_align.convert.architecture import read_architecture
from offline_align.convert.token_ids import check_token_ids
from offline_align.data.condition import Condition
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError
from offline_align.model.description import ModelDescription, is_huggingface


def describe(folder: Path, template: Template | None = None) -> ModelDescription:
    """Return the description of a model.

    A Hugging Face folder that names no template gets `template`, or the paper's. Raises ConfigError for such a folder
    if it is not supported, and for a tokenizer that is longer than the model; StorageError for a damaged checkpoint.
    """
    if not is_huggingface(folder):
        return ModelDescription.load(folder)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(folder)
    check_token_ids(folder, architecture.model, tokenizer)
    trained, condition = exported(folder, architecture.extra)
    return ModelDescription(
        kind=architecture.kind,
        model=architecture.model,
        template=trained or template or Template.paper,
        tokenizer_hash=tokenizer.content_hash,
        condition=condition,
        method=str(architecture.extra.get("method", "")),
    )


def tokenizer_of(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model; raises as `describe`, also for a checkpoint whose model is shorter."""
    if is_huggingface(folder):
        return load_tokenizer(folder)
    description = ModelDescription.load(folder)
    tokenizer = description.load_tokenizer(folder)
    check_token_ids(folder, description.model, tokenizer)
    return tokenizer


def exported(folder: Path, extra: dict[str, Any]) -> tuple[Template | None, Condition | None]:
    """Return the template and the condition that our exporter wrote into `config.json`; ConfigError."""
    try:
        template = extra.get("template")
        return Template(template) if template else None, Condition.from_values(extra.get("condition"))
    except ValueError as error:
        raise ConfigError(f"init.from: {folder / 'config.json'}: offline_align: {error}; export it again") from error
