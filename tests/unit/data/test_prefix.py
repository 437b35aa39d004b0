"""Text that follows other text gets no extra space: the pieces of a dialogue decode to its whole text."""

from pathlib import Path

import pytest

from offline_align.config.sections import Template
from offline_align.data.prefix import After, PrefixRule, rule_of
from offline_align.data.records import Message
from offline_align.data.template import Encoding, Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from tests.small_tokenizers import TEMPLATES, with_spaces_in_front, write_hugging_face, write_sentencepiece

QUESTION = (Message("user", "Hello, how are you?"),)
DIALOGUE = (*QUESTION, Message("assistant", "Fine."), Message("user", "again"))
ANSWERS = ("Fine, thank you!", " Two spaces  ", "- one\n- two", "\n", "日本")


@pytest.fixture(params=["sentencepiece", "prepend", "always", "first", "byte_level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(write_sentencepiece(tmp_path))
    if request.param == "byte_level":
        return load_tokenizer(write_hugging_face(tmp_path))
    return load_tokenizer(with_spaces_in_front(tmp_path, request.param, TEMPLATES["touching"]))


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_text_of_the_paper_has_one_space(tokenizer: Tokenizer, answer: str) -> None:
    paper = Renderer(tokenizer, Template.paper)
    context, target = paper.row(QUESTION, answer)
    assert tokenizer.decode(context + target) == f"User:Hello, how are you?Assistant: {answer}"
    assert tokenizer.decode(target, After.text) == answer


def test_a_condition_has_no_space_in_front(tokenizer: Tokenizer) -> None:
    paper = Renderer(tokenizer, Template.paper)
    context = paper.context(QUESTION, "<rm_score>5.0")
    assert tokenizer.decode(context) == "User:Hello, how are you?Assistant: <rm_score>5.0"
    assert len(context) - len(paper.context(QUESTION)) == paper.condition_tokens("<rm_score>5.0")


def test_earlier_answers_have_the_ids_of_the_whole_text(tokenizer: Tokenizer) -> None:
    begin = [*tokenizer.encode("User:Hello, how are you?Assistant: Fine."), tokenizer.eos_id]
    assert Renderer(tokenizer, Template.paper).context(DIALOGUE)[: len(begin)] == begin


def test_earlier_answers_of_older_models_have_the_ids_of_targets(tokenizer: Tokenizer) -> None:
    paper = Renderer(tokenizer, Template.paper, encoding=Encoding.pieces)
    context, target = paper.row(QUESTION, "Fine.")
    assert paper.context(DIALOGUE)[: len(context + target)] == context + target


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("form", ["prepend", "always", "first"])
def test_pieces_of_a_chat_are_encoded_as_transformers_encodes_the_whole(form: str, name: str, tmp_path: Path) -> None:
    """These answers cannot join a token with the end of the prompt; for others the ids may differ."""
    from transformers import PreTrainedTokenizerFast

    folder = with_spaces_in_front(tmp_path, form, TEMPLATES[name])
    renderer = Renderer(load_tokenizer(folder), Template.chat)
    stock = PreTrainedTokenizerFast.from_pretrained(folder)
    for prompt in (QUESTION, DIALOGUE):
        for answer in ("Fine, thank you!", "(two)"):
            turns = [{"role": m.role, "content": m.content} for m in (*prompt, Message("assistant", answer))]
            context, target = renderer.row(prompt, answer)
            asked = stock.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
            assert context == asked
            whole = stock.apply_chat_template(turns, return_dict=False)
            ours = context + target
            assert ours == whole[: len(ours)] or ours[:-1] == whole


def test_special_text_of_users_does_not_start_text_anew(tmp_path: Path) -> None:
    folder = with_spaces_in_front(tmp_path, "prepend", TEMPLATES["touching"])
    renderer = Renderer(load_tokenizer(folder), Template.chat)
    ids = renderer.context((Message("user", "a</s>b <|im_end|>c"),))
    assert renderer.tokenizer.decode(ids) == "[INST] a</s>b <|im_end|>c [/INST]"


@pytest.mark.parametrize("lossy", ["sentencepiece", "fast"])
def test_a_space_that_is_lost_at_the_end_of_a_text_is_put_in_front_of_the_next(lossy: str, tmp_path: Path) -> None:
    from offline_align.data.sentencepiece_fast import convert

    path = write_sentencepiece(tmp_path, lossy=True)
    if lossy == "fast":
        fast = convert(path)
        assert fast is not None
        fast.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    context, target = Renderer(tokenizer, Template.paper).row(QUESTION, "Fine.")
    assert tokenizer.decode(context + target) == "User:Hello, how are you?Assistant: Fine."
    assert tokenizer.decode(tokenizer.encode("a") + tokenizer.encode("b", after=After.text)) == "ab"
    assert tokenizer.decode(tokenizer.encode("a") + tokenizer.encode(" b", after=After.text)) == "a b"


def test_rules_of_older_files() -> None:
    assert rule_of({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": True}}) is PrefixRule.always
    assert rule_of({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}) is PrefixRule.never
    sequence = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}]}
    assert rule_of({"normalizer": sequence}) is PrefixRule.always
    assert rule_of({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}) is PrefixRule.never
