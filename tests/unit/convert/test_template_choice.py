"""The template of a model that records none: its folder's chat template, if it can be used, and why."""

from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import Template
from offline_align.convert.template_choice import TemplateChoice, automatic
from offline_align.data.tokenizer import load_tokenizer
from tests.small_tokenizers import CHATML, TEMPLATES, write_hugging_face, write_sentencepiece

REWRITES = (
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
NO_TOOLS: list[dict[str, Any]] = [{"name": "rag", "template": CHATML}, {"name": "tool_use", "template": CHATML}]


def choice(folder: Path, source: Any, trains: bool = True, must: bool = False) -> TemplateChoice:
    tokenizer = load_tokenizer(write_hugging_face(folder, source))
    return automatic(tokenizer, "models/x", trains, must)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_usable_chat_template_is_chosen(name: str, tmp_path: Path) -> None:
    """Among them those that write an empty thought before an answer, as that of Qwen3 does."""
    found = choice(tmp_path, TEMPLATES[name])
    assert (found.template, found.is_fallback) == (Template.chat, False)
    assert found.in_words() == "chat, from models/x (tokenizer_config.json)"


def test_a_template_of_its_own_file_is_named(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, REWRITES)
    (folder / "chat_template.jinja").write_text(CHATML)
    found = automatic(load_tokenizer(folder), "models/x", trains=True)
    assert found.in_words() == "chat, from models/x (chat_template.jinja)"


def test_blocks_that_mark_generated_text_change_nothing(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert choice(tmp_path, source).template is Template.chat


def test_without_a_chat_template_it_is_the_papers(tmp_path: Path) -> None:
    found = automatic(load_tokenizer(write_sentencepiece(tmp_path)), "models/x", trains=True)
    assert found.in_words() == "paper, because models/x has no chat template"
    assert not found.is_fallback


def test_named_templates_without_a_default_are_listed(tmp_path: Path) -> None:
    assert "tokenizer_config.json has chat templates only for rag, tool_use" in choice(tmp_path, NO_TOOLS).in_words()
    both = [*NO_TOOLS, {"name": "default", "template": CHATML}]
    assert choice(tmp_path, both).template is Template.chat


@pytest.mark.parametrize(
    ("source", "trains", "reason"),
    [
        (REWRITES, True, "it renders a prompt differently once it has an answer"),
        ("{% if %}", True, "not valid Jinja"),
        ("{% if %}", False, "not valid Jinja"),
        ("{{ raise_exception('needs tools') }}", False, "needs tools"),
    ],
)
def test_one_that_cannot_be_used_is_replaced_with_a_reason(
    source: str, trains: bool, reason: str, tmp_path: Path
) -> None:
    found = choice(tmp_path, source, trains)
    assert (found.template, found.is_fallback) == (Template.paper, True)
    assert reason in found.why and "data.template=chat insists on it" in found.why
    assert "\n" not in found.why


def test_generation_needs_only_prompts(tmp_path: Path) -> None:
    assert choice(tmp_path, REWRITES, trains=False).template is Template.chat


def test_a_reward_model_of_others_keeps_its_template(tmp_path: Path) -> None:
    assert choice(tmp_path, "{% if %}", must=True).template is Template.chat


@pytest.mark.parametrize(
    ("source", "note"),
    [
        (NO_SYSTEM, "it refuses system messages, so rows that have one are bad"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "it leaves out system messages"),
    ],
)
def test_what_becomes_of_system_messages_is_said(source: str, note: str, tmp_path: Path) -> None:
    found = choice(tmp_path, source)
    assert found.template is Template.chat
    assert found.in_words() == f"chat, from models/x (tokenizer_config.json); {note}"
