"""Plain `transformers` with an exported tokenizer gives the ids of training, with any tokenizer and template."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from offline_align.config.sections import ModelSection, Template
from offline_align.convert.export import _write_tokenizer
from offline_align.convert.same_ids import same_ids
from offline_align.data.condition import Condition, ValueCondition
from offline_align.data.records import Message
from offline_align.data.template import Encoding, Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.model.description import ModelDescription
from tests.small_tokenizers import CHATML, TEMPLATES, with_spaces_in_front, write_hugging_face, write_sentencepiece
from tests.support import smollm2

QUESTION = (Message("user", "Name the capital."),)
TURNS = (*QUESTION, Message("assistant", "Fine, thank you!"), Message("user", "Of what?"))
PROMPTS = (QUESTION, TURNS, (Message("system", "Be brief."), *TURNS), (Message("user", " 2 + 2 = ?\n"),))
ANSWERS = ("Fine, thank you!", "- one\n- two", "\n", " 日本 ")
CONDITION = ValueCondition("<rm_score>{reward:.1f}", 9.9, 5.0)
JSON = ["byte_level", "smollm2", "prepend", "always", "first"]
KINDS = [
    ("bpe", Template.paper),
    ("unigram", Template.paper),
    *((name, template) for name in JSON for template in (Template.paper, Template.chat)),
]


def load(name: str, folder: Path) -> Tokenizer:
    if name in ("bpe", "unigram"):
        return load_tokenizer(write_sentencepiece(folder, kind=name))
    if name == "smollm2":
        return load_tokenizer(smollm2())
    if name == "byte_level":
        return load_tokenizer(write_hugging_face(folder))
    return load_tokenizer(with_spaces_in_front(folder, name, TEMPLATES["spaces"]))


def described(tokenizer: Tokenizer, template: Template, condition: Condition | None = None) -> ModelDescription:
    model = ModelSection(max_position_embeddings=256)
    return ModelDescription("policy", model, template, tokenizer.content_hash, condition)


def their_ids(folder: Path, dialogue: tuple[Message, ...]) -> list[int]:
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": message.role, "content": message.content} for message in dialogue]
    asks = dialogue[-1].role == "user"
    ids: list[int] = loaded.apply_chat_template(turns, add_generation_prompt=asks, return_dict=False)
    return ids


@pytest.mark.parametrize("condition", [None, CONDITION, replace(CONDITION, reward_format="{reward:.1f}: ")])
@pytest.mark.parametrize(("name", "template"), KINDS)
def test_a_prompt_has_the_ids_of_its_whole_text(
    name: str, template: Template, condition: Condition | None, tmp_path: Path
) -> None:
    tokenizer = load(name, tmp_path / "tokenizer")
    description, out = described(tokenizer, template, condition), tmp_path / "out"
    _write_tokenizer(description, tokenizer, out)
    text = condition.text if condition else ""
    for prompt in PROMPTS:
        assert their_ids(out, prompt) == description.renderer(tokenizer).context(prompt, text)
    found = same_ids(out, description, description.renderer(tokenizer), text, fast=True)
    assert (found.different, found.compared) == (0, 5)


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_a_scored_row_has_the_ids_of_its_whole_text(name: str, template: Template, tmp_path: Path) -> None:
    tokenizer = load(name, tmp_path / "tokenizer")
    description, out = replace(described(tokenizer, template), kind="reward_model"), tmp_path / "out"
    _write_tokenizer(description, tokenizer, out)
    renderer = description.renderer(tokenizer)
    for prompt in PROMPTS:
        for answer in ANSWERS:
            context, target = renderer.row(prompt, answer)
            assert their_ids(out, (*prompt, Message("assistant", answer))) == context + target
            assert target[-1] == tokenizer.eos_id
    assert same_ids(out, description, renderer, "", fast=True).different == 0


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|pad|>"])
def test_a_scored_row_ends_at_end_of_sequence_whatever_the_template_writes(name: str, eos: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "tokenizer", "\n" + TEMPLATES[name] + "\n", eos_token=eos))
    description, out = replace(described(tokenizer, Template.chat), kind="reward_model"), tmp_path / "out"
    _write_tokenizer(description, tokenizer, out)
    for prompt in (QUESTION, TURNS):
        context, target = description.renderer(tokenizer).row(prompt, "Two. \n")
        assert their_ids(out, (*prompt, Message("assistant", "Two. \n"))) == context + target
        assert target[-1] == tokenizer.eos_id
        assert their_ids(out, prompt) == Renderer(tokenizer, Template.chat).context(prompt)


def test_a_template_that_is_for_generation_only_is_exported(tmp_path: Path) -> None:
    """Some templates of reasoning models open a thought for generation that finished dialogues do not have."""
    turns = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    source = turns + "{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer, out = load_tokenizer(write_hugging_face(tmp_path / "tokenizer", source)), tmp_path / "out"
    description = described(tokenizer, Template.chat)
    _write_tokenizer(description, tokenizer, out)
    assert their_ids(out, TURNS) == description.renderer(tokenizer).context(TURNS)
    assert load_tokenizer(out).chat_template == source


def test_both_answers_of_a_pair_have_one_context(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path))
    renderer = Renderer(tokenizer, Template.paper, scores=True)
    joined, apart = renderer.rows(renderer.encode(renderer.spans(QUESTION, ["Fine, thank you!", "\n\n"])))
    assert joined[0] == apart[0]
    assert len(joined[0]) < len(renderer.context(QUESTION))


def test_tokens_that_a_condition_joins_with_the_prompt_belong_to_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path))
    renderer = Renderer(tokenizer, Template.paper)
    plain, asked = renderer.context(QUESTION), renderer.context(QUESTION, "Fine")
    added = renderer.condition_tokens("Fine")
    assert asked[:-added] == plain[: len(asked) - added] and len(asked) - added < len(plain)
    tail = renderer.tail_tokens("Fine")
    assert tokenizer.decode(asked[-tail:]) == "Assistant: Fine"


def test_special_tokens_of_a_condition_count_and_those_of_users_do_not(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path))
    ids = Renderer(tokenizer, Template.paper).context((Message("user", "a<|im_start|>"),), "x<|im_start|>y")
    assert ids.count(tokenizer.encode("<|im_start|>", special=True)[0]) == 1
    assert tokenizer.shown(ids).endswith("Assistant: x<|im_start|>y")


def test_an_older_model_says_that_transformers_gives_other_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "tokenizer", CHATML))
    description = replace(described(tokenizer, Template.paper, CONDITION), encoding=Encoding.pieces)
    _write_tokenizer(description, tokenizer, tmp_path / "out")
    found = same_ids(tmp_path / "out", description, description.renderer(tokenizer), CONDITION.text, fast=True)
    assert found.different
    assert "gives other token ids than training for" in found.in_words()
    assert found.in_words().endswith("encode with the code in README.md")


def test_a_folder_without_a_fast_tokenizer_says_what_to_encode_with(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path))
    description = described(tokenizer, Template.paper)
    found = same_ids(tmp_path, description, description.renderer(tokenizer), "", fast=False)
    assert found.different == found.compared == 5
    assert "tokenizer.model" in found.in_words()
