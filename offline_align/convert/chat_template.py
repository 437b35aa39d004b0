"""Chat templates of exported folders: `apply_chat_template` gives the same prompts as `generate`."""

import json
from datetime import date

from offline_align.config.sections import Template
from offline_align.data.chat import with_day
from offline_align.data.template import ASSISTANT, PREFIXES
from offline_align.data.tokenizer import Tokenizer


def chat_template(tokenizer: Tokenizer, template: Template, condition: str, template_date: str | None = None) -> str:
    """Return the chat template of an exported policy or reward model.

    It is the paper's template in Jinja, or the tokenizer's own chat template. `condition` (the
    reward text of Conditional Alignment, Eq. 6, or empty) follows the generation prompt, right
    before the response. If the template writes the current date, it is fixed to `template_date`,
    the date of training.
    """
    if template is Template.chat:
        assert tokenizer.chat_template is not None
        source = tokenizer.chat_template.removesuffix("\n")
        if template_date is not None:
            source = with_day(source, date.fromisoformat(template_date)) or source
        return source + _at_generation_prompt(condition) if condition else source
    start = "{{ bos_token }}" if tokenizer.adds_bos else ""
    return start + _PAPER + _at_generation_prompt(ASSISTANT + condition)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _at_generation_prompt(text: str) -> str:
    return "{% if add_generation_prompt %}{{ " + _literal(text) + " }}{% endif %}"


_PAPER = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ " + _literal(ASSISTANT) + " + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}"
    "{{ " + _literal(PREFIXES["system"]) + " + message['content'] }}"
    "{% else %}"
    "{{ " + _literal(PREFIXES["user"]) + " + message['content'] }}"
    "{% endif %}"
    "{% endfor %}"
)
