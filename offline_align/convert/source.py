"""The source of a model: one of our checkpoints, a Hugging Face folder, or random weights."""

import logging
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from offline_align.config.sections import ModelSection, Template
from offline_align.convert.architecture import Architecture, read_architecture
from offline_align.convert.files import stored_dtype
from offline_align.convert.template_choice import TemplateChoice, automatic
from offline_align.convert.token_ids import check_token_ids
from offline_align.data.condition import Condition
from offline_align.data.template import Encoding, Reading, Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError
from offline_align.model.description import (
    ModelDescription,
    day_of,
    find_model,
    is_huggingface,
    recorded_template,
)
from offline_align.progress import announced

if TYPE_CHECKING:
    import torch

    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)


class Form(Enum):
    """Where the weights of a model come from."""

    checkpoint = "one of our checkpoints"
    huggingface = "a Hugging Face folder"
    random = "random weights"


@dataclass(frozen=True)
class ModelSource:
    """A model before it is built: its description, its tokenizer and the location of its weights."""

    description: ModelDescription
    tokenizer: Tokenizer
    form: Form
    folder: Path | None = None
    """The checkpoint or the Hugging Face folder; None for random weights."""
    states_template: bool = False
    """Whether the model records the template of its training. If not, the user may choose a template."""
    named: str = ""
    """The folder or the tokenizer, as the user named it."""
    choice: TemplateChoice | None = None
    """The template of a run with this model, and why it is used; None if no run asked."""

    @property
    def model(self) -> ModelSection:
        """The architecture, with the vocabulary size filled in."""
        return self.description.model

    @property
    def kind(self) -> str:
        """`policy` or `reward_model`."""
        return self.description.kind

    def choose(self, given: Template | None, trains: bool = False) -> TemplateChoice:
        """Return the template of the model: the recorded one, otherwise `given`, otherwise the automatic one.

        `trains` says that the model is trained with it. Whether `given` contradicts the recorded one
        is for the caller to say.
        """
        own = self.description
        if self.states_template:
            return TemplateChoice(own.template, f", recorded in {self.named}")
        if given is not None and given is not Template.auto:
            return TemplateChoice(given, ", as data.template says")
        is_foreign_judge = own.reading is not None
        return automatic(self.tokenizer, self.named, trains and not is_foreign_judge, must=is_foreign_judge)

    def renderer(self) -> Renderer:
        """Return the renderer that encodes dialogues as the model reads them."""
        return self.description.renderer(self.tokenizer)

    def load_into(self, module: "torch.nn.Module", ranks: "Ranks", fresh_prefixes: tuple[str, ...] = ()) -> None:
        """Load the weights into a built model, at any parallel layout.

        Parameters whose names start with one of `fresh_prefixes` keep their random values if the
        source has no weights for them.
        """
        if self.folder is None:
            logger.warning("init.from is not set: the model starts from random weights")
            return
        with announced(f"loading the weights of {self.folder}", enabled=ranks.is_main):
            self._load(module, self.folder, ranks, fresh_prefixes)

    def _load(self, module: "torch.nn.Module", folder: Path, ranks: "Ranks", fresh_prefixes: tuple[str, ...]) -> None:
        if self.form is Form.checkpoint:
            from offline_align.train.checkpoint import load_weights

            load_weights(module, folder, ranks, fresh_prefixes)
        else:
            from offline_align.convert.load import load_into

            load_into(module, folder, ranks, self.model.make_vocab_size_divisible_by, fresh_prefixes)


def open_model(
    path: str | Path,
    key: str = "init.from",
    template: Template | None = None,
    template_date: str | None = None,
    tokenizer: Path | None = None,
) -> ModelSource:
    """Return the model in `path`: a run folder, a checkpoint folder or a Hugging Face folder.

    `key` is the setting that named it, for messages. `template` and `template_date` apply only to a
    model that does not record its own. `tokenizer` replaces the tokenizer of a Hugging Face folder.
    Raises ConfigError if the folder is not a supported model or the tokenizer has more entries than
    the model, StorageError for a damaged checkpoint.
    """
    folder = find_model(path, key)
    try:
        found = _from_huggingface(folder, tokenizer) if is_huggingface(folder) else _from_checkpoint(folder)
    except ConfigError as error:
        raise ConfigError([problem.replace("init.from:", f"{key}:", 1) for problem in error.problems]) from error
    found = replace(found, named=str(path))
    own = found.description
    chosen = found.choose(template).template
    described = replace(own, template=chosen, template_date=own.template_date or template_date)
    return replace(found, description=described)


def _from_checkpoint(folder: Path) -> ModelSource:
    description = ModelDescription.load(folder)
    tokenizer = description.load_tokenizer(folder)
    check_token_ids(folder, description.model, tokenizer)
    # `convert` has imported a checkpoint without a method, so the template of its training is unknown.
    states_template = bool(description.method)
    if not states_template:
        description = replace(description, encoding=Encoding.whole)
    return ModelSource(description, tokenizer, Form.checkpoint, folder, states_template)


def _from_huggingface(folder: Path, given: Path | None) -> ModelSource:
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(given or folder)
    check_token_ids(folder, architecture.model, tokenizer, f"model.tokenizer={given}" if given else "init.from")
    try:
        description = _description(architecture, tokenizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"init.from: {folder / 'config.json'}: the entry offline_align is damaged: {error}; export the model again"
        ) from error
    states_template = bool(architecture.extra.get("template"))
    description = replace(description, source_dtype=stored_dtype(folder))
    return ModelSource(description, tokenizer, Form.huggingface, folder, states_template)


def _description(architecture: Architecture, tokenizer: Tokenizer) -> ModelDescription:
    """Return the description that our export stored in `config.json`, or one for a third-party model.

    A third-party reward model is assumed to be trained with its chat template, if it has one, and to
    read text as in `transformers`. Raises TypeError or ValueError if the stored entry is damaged.
    """
    extra = architecture.extra
    foreign = architecture.kind == "reward_model" and not extra
    before = Encoding.pieces if extra.get("template") else Encoding.whole
    return ModelDescription(
        kind=architecture.kind,
        model=architecture.model,
        template=recorded_template(extra["template"]) if extra.get("template") else Template.paper,
        tokenizer_hash=tokenizer.content_hash,
        condition=Condition.from_values(extra.get("condition")),
        method=str(extra.get("method", "")),
        template_date=day_of(extra.get("template_date")),
        reading=Reading(architecture.pad_token_id) if foreign else Reading.from_values(extra.get("reading")),
        encoding=Encoding(extra.get("encoding", before)),
    )
