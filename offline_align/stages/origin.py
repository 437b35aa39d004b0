"""The model of a run: what `init.from` names, combined with the user's other settings."""

import contextlib
import dataclasses
from dataclasses import replace
from pathlib import Path

from offline_align.config.checks import template_date
from offline_align.config.resume import FREE_MODEL_KEYS
from offline_align.config.runs import ModelRun, TrainRun, section
from offline_align.config.sections import DataSection, ModelSection, Template
from offline_align.convert.source import Form, ModelSource, open_model
from offline_align.convert.template_choice import TemplateChoice
from offline_align.data.template import Encoding, writes_date
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError, StorageError
from offline_align.model.description import FILE_NAME, ModelDescription


def resolve(config: ModelRun, explicit: frozenset[str]) -> ModelSource:
    """Return the model that `init.from` and `model.*` name.

    `explicit` are the keys that the user set. Raises ConfigError with all problems.
    """
    found = _fresh(config) if config.init.from_ is None else _opened(config, config.init.from_, explicit)
    data = section(config, DataSection)
    choice = template_choice(config, found, explicit)
    encoding = _encoding(config, found)
    described = replace(found.description, template=choice.template, encoding=encoding)
    found = replace(found, description=described, choice=choice if data else None)
    day = _template_date(data.template_date if data else None, found)
    return replace(found, description=replace(found.description, template_date=day))


def tokenizer_path(name: str) -> Path:
    """Return the path of a tokenizer: the packaged one for `demo`, otherwise `name` itself."""
    if name == "demo":
        from offline_align.data.demo import demo_tokenizer_path

        return demo_tokenizer_path()
    return Path(name)


def _fresh(config: ModelRun) -> ModelSource:
    if config.model.tokenizer is None:
        raise ConfigError(
            "model.tokenizer is not set: give a SentencePiece .model, a tokenizer.json or a Hugging Face folder, "
            "or weights that bring one with init.from"
        )
    tokenizer = load_tokenizer(tokenizer_path(config.model.tokenizer))
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={size}: the tokenizer has {tokenizer.vocab_size} entries; leave it unset to take those"
        )
    model = replace(config.model, vocab_size=size or tokenizer.vocab_size)
    description = ModelDescription("policy", model, Template.paper, tokenizer.content_hash)
    return ModelSource(description, tokenizer, Form.random, named=config.model.tokenizer)


def _opened(config: ModelRun, source: str, explicit: frozenset[str]) -> ModelSource:
    given = config.model.tokenizer if "model.tokenizer" in explicit else None
    tokenizer = tokenizer_path(given) if given is not None else None
    found = open_model(source, tokenizer=tokenizer)
    if tokenizer is not None and load_tokenizer(tokenizer).content_hash != found.tokenizer.content_hash:
        raise ConfigError(
            f"model.tokenizer={given}: init.from={source} was trained with another tokenizer; "
            "leave model.tokenizer unset"
        )
    return replace(
        found, description=replace(found.description, model=_merged(config.model, found.model, explicit, source))
    )


def _merged(given: ModelSection, found: ModelSection, explicit: frozenset[str], source: str) -> ModelSection:
    """Return the architecture of the weights. Raises ConfigError if the user set other values."""
    problems = []
    for field in dataclasses.fields(ModelSection):
        key, value, own = f"model.{field.name}", getattr(given, field.name), getattr(found, field.name)
        if key in explicit and key not in FREE_MODEL_KEYS and value != own:
            problems.append(f"{key}={value}: the weights of init.from={source} have {own}; leave it unset")
    if problems:
        raise ConfigError(problems)
    return replace(found, backend=given.backend, overrides=found.overrides | given.overrides)


def template_choice(config: ModelRun, source: ModelSource, explicit: frozenset[str]) -> TemplateChoice:
    """Return the template of a run, and why. Raises ConfigError if the model records another one than was set."""
    data = section(config, DataSection)
    given, own = data.template if data else Template.auto, source.description
    if source.states_template and given not in (None, Template.auto, own.template):
        raise ConfigError(
            f"data.template={given}: the model in init.from was trained with {own.template}; leave data.template unset"
        )
    if given is None and not source.states_template:  # a run that an earlier version began without the key
        has_template = own.reading is not None and source.tokenizer.chat_template is not None
        return TemplateChoice(Template.chat if has_template else Template.paper, ", as this run began")
    choice = source.choose(given, trains=isinstance(config, TrainRun))
    was_chosen = given is not Template.auto and "data.template" not in explicit and not source.states_template
    return replace(choice, why=", as this run began") if was_chosen else choice


def _encoding(config: ModelRun, source: ModelSource) -> Encoding:
    """Return how texts are encoded: as in the checkpoint of this run if it is continued, else as in the model."""
    if isinstance(config, TrainRun):
        for begun in sorted((Path(config.run.dir) / "checkpoints").glob(f"step_*/{FILE_NAME}"), reverse=True):
            # A damaged checkpoint is set aside later, and the run continues from the one before.
            with contextlib.suppress(StorageError):
                return ModelDescription.load(begun.parent).encoding
    return source.description.encoding


def _template_date(given: str | None, source: ModelSource) -> str | None:
    """Return the date that the template writes; None if it writes none or none is fixed."""
    if template_date(given):
        return None  # `config.checks` reports it
    trained = source.description.template_date
    if trained is not None and given is not None and given != trained:
        raise ConfigError(
            f"data.template_date={given}: the model in init.from was trained with {trained}; leave it unset"
        )
    return (trained or given) if writes_date(source.tokenizer, source.description.template) else None
