"""What a folder of weights is, whichever form it has: a checkpoint of ours, or a Hugging Face folder."""

from dataclasses import dataclass, replace
from pathlib import Path

from offline_align.config.sections import Template
from offline_align.convert.architecture import Architecture, read_architecture
from offline_align.data.template import Reading
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError
from offline_align.model.description import Condition, ModelDescription, day_of, is_huggingface


def describe(folder: Path, template: Template | None = None, template_date: str | None = None) -> ModelDescription:
    """Return the description of a model.

    `template` and `template_date` are for a Hugging Face folder that does not say its own, see `text_of`. Raises
    ConfigError for such a folder where it is not supported, StorageError for a damaged checkpoint.
    """
    if not is_huggingface(folder):
        found = ModelDescription.load(folder)
        return replace(found, template_date=found.template_date or template_date)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(folder)
    text = text_of(folder, architecture, tokenizer)
    return ModelDescription(
        kind=architecture.kind,
        model=architecture.model,
        template=text.template or template or text.usual,
        tokenizer_hash=tokenizer.content_hash,
        condition=text.condition,
        method=str(architecture.extra.get("method", "")),
        template_date=text.template_date or template_date,
        reading=text.reading,
    )


def tokenizer_of(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model; raises as `describe`."""
    return load_tokenizer(folder) if is_huggingface(folder) else ModelDescription.load(folder).load_tokenizer(folder)


@dataclass(frozen=True)
class Text:
    """How a Hugging Face folder reads text."""

    template: Template | None
    """The template that our exporter has recorded."""
    usual: Template
    """The template of a folder of others, unless the user gives one."""
    condition: Condition | None
    template_date: str | None
    reading: Reading | None


def text_of(folder: Path, architecture: Architecture, tokenizer: Tokenizer) -> Text:
    """Return what our exporter wrote into `config.json` of how text is read, or how the folder of others reads it.

    Reward models of others were trained with their chat template, if they have one, and are read as `transformers`
    reads them. Raises ConfigError for a damaged record.
    """
    extra = architecture.extra
    foreign = architecture.kind == "reward_model" and not extra
    usual = Template.chat if foreign and tokenizer.chat_template is not None else Template.paper
    try:
        return Text(
            Template(extra["template"]) if extra.get("template") else None,
            usual,
            Condition.from_values(extra.get("condition")),
            day_of(extra.get("template_date")),
            Reading(architecture.pad_token_id) if foreign else Reading.from_values(extra.get("reading")),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"init.from: {folder / 'config.json'}: offline_align: {error}; export it again") from error
