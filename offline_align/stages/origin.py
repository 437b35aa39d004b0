"""Where a stage's model comes from: a checkpoint of ours, a Hugging Face folder, or random weights."""

import dataclasses
import logging
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from offline_align.config.checks import template_date
from offline_align.config.runs import ModelRun
from offline_align.config.sections import ModelSection, Template
from offline_align.data.template import Reading, Renderer, writes_date
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError
from offline_align.model.description import Condition, ModelDescription, find_checkpoint, is_huggingface

if TYPE_CHECKING:
    import torch

    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)
# These say how a model is run here, not what it is.
_FREE_KEYS = {"model.tokenizer", "model.backend", "model.overrides"}


@dataclass(frozen=True)
class Origin:
    """A model before it is built: architecture, tokenizer, template and where its weights lie."""

    model: ModelSection
    """Architecture with the vocabulary size filled in."""
    tokenizer: Tokenizer
    template: Template
    kind: str
    """"policy" or "reward_model"."""
    checkpoint: Path | None
    """Checkpoint of ours."""
    huggingface: Path | None
    """Folder in Hugging Face form."""
    condition: Condition | None
    method: str
    template_date: str | None = None
    """The day that the template takes for today: that of the training of the model, else that of the settings."""
    reading: Reading | None = None
    """How a reward model of others reads rows."""

    def renderer(self) -> Renderer:
        """Return what turns dialogues into ids as the model reads them."""
        day = date.fromisoformat(self.template_date) if self.template_date else None
        return Renderer(self.tokenizer, self.template, day, self.reading)


def resolve(config: ModelRun, explicit: frozenset[str]) -> Origin:
    """Return the origin that `init.from` and `model.*` name; raises ConfigError with all that is wrong."""
    found = _found(config, explicit)
    return replace(found, template_date=_template_date(config, found))


def _found(config: ModelRun, explicit: frozenset[str]) -> Origin:
    """Return the origin with the day of its training alone."""
    source = config.init.from_
    if source is None:
        return _fresh(config)
    if is_huggingface(source):
        return _from_huggingface(config, Path(source), explicit)
    folder = find_checkpoint(source)
    description = ModelDescription.load(folder)
    tokenizer = description.load_tokenizer(folder)
    if "model.tokenizer" in explicit and config.model.tokenizer is not None:
        given = load_tokenizer(tokenizer_path(config.model.tokenizer))
        if given.content_hash != tokenizer.content_hash:
            raise ConfigError(
                f"model.tokenizer={config.model.tokenizer}: init.from={source} was trained with another tokenizer; "
                "leave model.tokenizer unset"
            )
    return Origin(
        model=_merged(config.model, description.model, explicit, source),
        tokenizer=tokenizer,
        template=_template(config, description.template if description.method else None, description.template),
        kind=description.kind,
        checkpoint=folder,
        huggingface=None,
        condition=description.condition,
        method=description.method,
        template_date=description.template_date,
        reading=description.reading,
    )


def tokenizer_path(name: str) -> Path:
    """Return the path of a tokenizer: the packaged one for `demo`, else `name` itself."""
    if name == "demo":
        from offline_align.data.demo import demo_tokenizer_path

        return demo_tokenizer_path()
    return Path(name)


def _fresh(config: ModelRun) -> Origin:
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
    return Origin(model, tokenizer, _template(config, None), "policy", None, None, None, "")


def _from_huggingface(config: ModelRun, folder: Path, explicit: frozenset[str]) -> Origin:
    from offline_align.convert.architecture import read_architecture
    from offline_align.convert.describe import text_of

    architecture = read_architecture(folder)
    model = _merged(config.model, architecture.model, explicit, str(folder))
    given = config.model.tokenizer if "model.tokenizer" in explicit else None
    tokenizer = load_tokenizer(tokenizer_path(given) if given is not None else folder)
    text = text_of(folder, architecture, tokenizer)
    return Origin(
        model=model,
        tokenizer=tokenizer,
        template=_template(config, text.template, text.usual),
        kind=str(architecture.kind),
        checkpoint=None,
        huggingface=folder,
        condition=text.condition,
        method=str(architecture.extra.get("method", "")),
        template_date=text.template_date,
        reading=text.reading,
    )


def _merged(given: ModelSection, found: ModelSection, explicit: frozenset[str], source: str) -> ModelSection:
    """Return the architecture of the weights; raises ConfigError for keys that the user set otherwise."""
    problems = []
    for field in dataclasses.fields(ModelSection):
        key, value, own = f"model.{field.name}", getattr(given, field.name), getattr(found, field.name)
        if key in explicit and key not in _FREE_KEYS and value != own:
            problems.append(f"{key}={value}: the weights of init.from={source} have {own}; leave it unset")
    if problems:
        raise ConfigError(problems)
    return replace(found, backend=given.backend, overrides=found.overrides | given.overrides)


def _template(config: ModelRun, trained: Template | None, usual: Template = Template.paper) -> Template:
    data = getattr(config, "data", None)
    given = data.template if data is not None else None
    if trained is not None and given is not None and given is not trained:
        raise ConfigError(
            f"data.template={given}: the model in init.from was trained with {trained}; leave data.template unset"
        )
    return trained or given or usual


def _template_date(config: ModelRun, origin: Origin) -> str | None:
    """Return the day that the template takes for today, or None where it writes none or nobody has fixed one."""
    data = getattr(config, "data", None)
    given = data.template_date if data is not None else None
    if template_date(given):
        return None  # said by the checks of the settings
    trained = origin.template_date
    if trained is not None and given is not None and given != trained:
        raise ConfigError(
            f"data.template_date={given}: the model in init.from was trained with {trained}; leave it unset"
        )
    return (trained or given) if writes_date(origin.tokenizer, origin.template) else None


def load_origin(
    module: "torch.nn.Module", origin: Origin, ranks: "Ranks", fresh_prefixes: tuple[str, ...] = ()
) -> None:
    """Put the weights of `origin` into a built model; random ones stay where it has none, and are announced."""
    if origin.checkpoint is not None:
        from offline_align.train.checkpoint import load_weights

        load_weights(module, origin.checkpoint, ranks, fresh_prefixes)
    elif origin.huggingface is not None:
        from offline_align.convert.load import load_into

        load_into(module, origin.huggingface, ranks, origin.model.make_vocab_size_divisible_by, fresh_prefixes)
    else:
        logger.warning("init.from is not set: training starts from random weights")
