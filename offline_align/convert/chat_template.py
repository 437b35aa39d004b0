"""Chat templates of exported folders: `apply_chat_template` gives the same prompts as `generate`."""

import json
from datetime import date

from offline_align.config.sections import Template
from offline_align.data.chat import with_day
from offline_align.data.template import ASSISTANT, PREFIXES
from offline_align.data.tokenizer import Tokenizer


def chat_template(
    tokenizer: Tokenizer,
    template: Template,
    condition: str,
    template_date: str | None = None,
    ends_rows: bool = False,
) -> str:
    """Return the chat template of an exported policy or reward model.

    It is the paper's template in Jinja, or the tokenizer's own chat template. `condition` (the
    reward text of Conditional Alignment, Eq. 6, or empty) follows the generation prompt, right
    before the response. If the template writes the current date, it is fixed to `template_date`,
    the date of training. `ends_rows` makes a dialogue that ends with an answer end at end of
    sequence, where our reward models read the score.
    """
    if template is Template.chat:
        assert tokenizer.chat_template is not None
        source = tokenizer.chat_template.removesuffix("\n")
        if template_date is not None:
            source = with_day(source, date.fromisoformat(template_date)) or source
        source = source + _at_generation_prompt(condition) if condition else source
        return _ending(source) if ends_rows else source
    start = "{{ bos_token }}" if tokenizer.adds_bos else ""
    return start + _PAPER + _at_generation_prompt(ASSISTANT + condition)


def _ending(source: str) -> str:
    """Return a template that drops the white space behind a last end of sequence, or adds one if it has none.

    The empty outputs keep Jinja from trimming white space at both ends of the source.
    """
    return (
        "{% set whole_dialogue %}{{ '' }}" + source + "{{ '' }}{% endset %}"
        "{% if add_generation_prompt or messages[-1]['role'] != 'assistant' %}{{ whole_dialogue }}"
        "{% elif whole_dialogue.rstrip().endswith(eos_token) %}{{ whole_dialogue.rstrip() }}"
        "{% else %}{{ whole_dialogue + eos_token }}{% endif %}"
    )


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
