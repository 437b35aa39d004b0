"""The code in model cards of older models, run unchanged, encodes with `transformers` as in training."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from offline_align.config.sections import Template
from offline_align.convert.architecture import read_architecture
from offline_align.convert.export import export_huggingface
from offline_align.convert.load import load_huggingface
from offline_align.data.condition import Condition, ValueCondition
from offline_align.data.records import Message
from offline_align.data.template import Encoding, Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.model.description import ModelDescription
from tests.small_tokenizers import TEMPLATES, with_spaces_in_front, write_hugging_face, write_sentencepiece

CONDITION = ValueCondition("<rm_score>{reward:.1f}", 9.9, 5.0)
DIALOGUE = (Message("user", "Name the capital."), Message("assistant", "Fine, thank you!"), Message("user", "Of what?"))
DIALOGUES = (DIALOGUE[:1], DIALOGUE, (Message("system", "Be brief."), *DIALOGUE), (Message("user", " 2 + 2 = ?\n"),))
JSON = ["byte_level", "prepend", "always", "first"]
# A SentencePiece model has no chat template.
KINDS = [
    ("sentencepiece", Template.paper),
    *((name, template) for name in JSON for template in (Template.paper, Template.chat)),
]


@pytest.fixture
def export(save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Export a random model with a tokenizer, a template and a condition."""

    def run(
        tokenizer: Tokenizer, template: Template, condition: Condition | None = None, head: str = "ForCausalLM"
    ) -> Path:
        source = save_model("llama3", head)
        found = read_architecture(source)
        description = ModelDescription(
            found.kind, found.model, template, tokenizer.content_hash, condition, encoding=Encoding.pieces
        )
        export_huggingface(load_huggingface(source), description, tokenizer, tmp_path / "out")
        return tmp_path / "out"

    return run


def turns(dialogue: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in dialogue]


def their_context(folder: Path, dialogue: tuple[Message, ...]) -> list[int]:
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = loaded.apply_chat_template(turns(dialogue), add_generation_prompt=True, return_dict=False)
    return ids


def recipe_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names that the code of the model card defines; none if it has no code."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    defined: dict[str, Any] = {}
    if found:
        exec(found[1], defined)
    return defined


def joining(name: str, folder: Path) -> Tokenizer:
    """Return a tokenizer that joins pieces if it can, with a chat template if its kind can have one."""
    if name == "sentencepiece":
        return load_tokenizer(write_sentencepiece(folder))
    if name == "byte_level":
        return load_tokenizer(write_hugging_face(folder))
    return load_tokenizer(with_spaces_in_front(folder, name, TEMPLATES["spaces"]))


@pytest.mark.parametrize("condition", [None, CONDITION])
@pytest.mark.parametrize(("name", "template"), KINDS)
def test_the_card_of_a_policy_gives_the_prompts_of_training(
    name: str,
    template: Template,
    condition: Condition | None,
    export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = joining(name, tmp_path / "tokenizer")
    folder = export(tokenizer, template, condition)
    recipe = recipe_of(folder, monkeypatch)
    assert bool(recipe) == (template is Template.paper or condition is not None)
    text = "<rm_score>5.0" if condition else ""
    for dialogue in DIALOGUES:
        found = recipe["prompt_ids"](turns(dialogue)) if recipe else their_context(folder, dialogue)
        assert found == Renderer(tokenizer, template, encoding=Encoding.pieces).context(dialogue, text)


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_the_card_of_a_reward_model_gives_the_rows_of_training(
    name: str,
    template: Template,
    export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = joining(name, tmp_path / "tokenizer")
    folder = export(tokenizer, template, head="ForSequenceClassification")
    recipe = recipe_of(folder, monkeypatch)
    for dialogue in DIALOGUES:
        for answer in ("Fine, thank you!", "- one\n- two", "\n"):
            context, target = Renderer(tokenizer, template, encoding=Encoding.pieces).row(dialogue, answer)
            assert recipe["row_ids"]([*turns(dialogue), {"role": "assistant", "content": answer}]) == context + target


def test_byte_level_tokenizers_join_what_training_kept_apart(export: Callable[..., Path], tmp_path: Path) -> None:
    """Otherwise the tests above would run recipes that are not needed."""
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "tokenizer"))
    folder = export(tokenizer, Template.paper, CONDITION)
    older = Renderer(tokenizer, Template.paper, encoding=Encoding.pieces)
    assert their_context(folder, DIALOGUE) != older.context(DIALOGUE, "<rm_score>5.0")
