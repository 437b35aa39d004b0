"""Which template a model gets that records none: its folder's chat template, if it can be used, else the paper's."""

from dataclasses import dataclass

from offline_align.config.sections import Template
from offline_align.data.chat import limits, training_problem
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """A template, and the reason for it in words."""

    template: Template
    why: str
    is_fallback: bool = False
    """Whether there is a chat template that cannot be used."""

    def in_words(self) -> str:
        """Return the choice for the log and the dry run: `chat, from models/x (tokenizer_config.json)`."""
        return f"{self.template.value}{self.why}"


def automatic(tokenizer: Tokenizer, place: str, trains: bool, must: bool = False) -> TemplateChoice:
    """Return the template for `data.template=auto` with the tokenizer of the folder or file `place`.

    Generation needs a chat template that renders prompts. If the model is trained (`trains`), the
    rendering of a prompt must not change once it has an answer. A chat template that cannot be used
    is replaced by the paper's, unless a model `must` have it, as third-party reward models must.
    """
    if tokenizer.chat_template is None:
        reason = tokenizer.template_origin or f"{place} has no chat template"
        return TemplateChoice(Template.paper, f", because {reason}")
    origin = f"{place} ({tokenizer.template_origin})"
    try:
        problem = None if must else training_problem(tokenizer, trains)
        note = "" if must else limits(tokenizer)
    except (ConfigError, DataError) as error:  # the template is not valid, or refuses a simple question
        problem, note = str(error), ""
    if problem is None:
        return TemplateChoice(Template.chat, f", from {origin}{note}")
    why = f", because the chat template of {origin} cannot be used: {problem}; data.template=chat insists on it"
    return TemplateChoice(Template.paper, why, is_fallback=True)
