"""Companion files of a tokenizer have the same effect as in `transformers`, for both tokenizer formats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece

TEXTS = [
    "the quick brown fox",
    " a space in front, two  inside\n\nand lines ",
    "<|im_start|>user\nHello, how are you?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>  fox</s> fox <s>dog",
    "日本語 🦊 ﬁne",
    "scores <rm_score>5.0-->a",
    "<tool> x<tool>y",
    "",
]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def decoder(first: int, special: bool = True, **flags: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags
    texts = ("<|im_start|>", "<|im_end|>", "<tool>")
    return {
        str(first + i): {"content": text, "special": special and text != "<tool>"} | flags
        for i, text in enumerate(texts)
    }


def write_json(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def check(folder: Path) -> tuple[Tokenizer, Any]:
    """Compare the tokenizer of a folder with that of transformers, before and after saving it."""
    write_json(folder, config={"model_type": "llama"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    ours.save(folder / "saved")
    again = load_tokenizer(folder / "saved")
    assert again.content_hash == ours.content_hash
    for tokenizer in (ours, again):
        for text in TEXTS:
            assert tokenizer.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.vocab_size == len(theirs)
        assert (tokenizer.eos_id, tokenizer.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
        assert tokenizer.adds_bos == (theirs("a").input_ids[0] == theirs.bos_token_id)
        assert tokenizer.chat_template == theirs.chat_template
        assert tokenizer.decode(theirs.encode("the <tool> fox")) == "the <tool> fox"
    # transformers lists all symbols of a SentencePiece model; those that are not markers are plain text.
    assert set(theirs.all_special_tokens) - set(ours.special_texts) <= {"<unk>", "-->"}
    return ours, theirs


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"legacy": True, "add_bos_token": True},
        {"legacy": False, "add_bos_token": True, "chat_template": CHATML},
        {"add_prefix_space": False},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}},
    ],
    ids=str,
)
def test_a_sentencepiece_folder_gives_the_ids_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path, tokenizer_config=LLAMA | {"added_tokens_decoder": decoder(400)} | config)
    ours, _ = check(tmp_path)
    assert ours.vocab_size == 403
    assert ours.adds_bos == config.get("add_bos_token", False)
    assert ours.eos_id == (401 if "eos_token" in config else 2)


def test_special_strings_in_text_stay_text_there_too(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_json(tmp_path, tokenizer_config=LLAMA | {"added_tokens_decoder": decoder(400)})
    tokenizer = load_tokenizer(tmp_path)
    text = "a<|im_end|> b</s> c<rm_score>5"
    assert not {2, 3, 4, 400, 401} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_older_files_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    added = {"<tool>": 402, "<|im_start|>": 400, "<|im_end|>": 401}
    named = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    write_json(tmp_path, tokenizer_config=LLAMA, added_tokens=added, special_tokens_map=named)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    ours, _ = check(tmp_path)
    assert ours.eos_id == 401  # special_tokens_map.json overrides a tokenizer_config.json without added tokens


def test_a_sentencepiece_file_by_itself_is_read_alone(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path)
    alone = load_tokenizer(path)
    assert load_tokenizer(tmp_path).content_hash == alone.content_hash
    write_json(tmp_path, tokenizer_config=LLAMA | {"added_tokens_decoder": decoder(400)})
    assert load_tokenizer(path).content_hash == alone.content_hash
    assert load_tokenizer(tmp_path).vocab_size == alone.vocab_size + 3


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_beside_a_tokenizer_json(tmp_path: Path, special: bool) -> None:
    first = load_tokenizer(write_hugging_face(tmp_path)).vocab_size
    added = {str(first): {"content": "<tool>", "special": special, "normalized": False}}
    write_hugging_face(tmp_path, added_tokens_decoder=added)
    ours, _ = check(tmp_path) if not special else (load_tokenizer(tmp_path), None)
    assert ours.vocab_size == first + 1
    assert ours.encode("a<tool>", special=True)[-1] == first
    assert ("<tool>" in ours.special_texts) is special


def test_flags_and_lists_beside_a_tokenizer_json(tmp_path: Path) -> None:
    """The companion's `rstrip` applies and listed tokens are special; unchanged tokens have no effect."""
    folder = write_hugging_face(tmp_path / "hf", additional_special_tokens=["<tool>"])
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert "<tool>" in ours.special_texts
    assert ours.encode("a<tool>", special=True) == theirs.encode("a<tool>", add_special_tokens=False)
    before = load_tokenizer(write_hugging_face(tmp_path / "plain")).content_hash
    same = {"2": {"content": "<|im_end|>", "special": True, "normalized": False}}
    assert load_tokenizer(write_hugging_face(tmp_path / "same", added_tokens_decoder=same)).content_hash == before
    same["2"]["rstrip"] = True
    folder = write_hugging_face(tmp_path / "other", added_tokens_decoder=same)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a<|im_end|> b", special=True) == theirs.encode("a<|im_end|> b", add_special_tokens=False)
    assert ours.content_hash != before


@pytest.mark.parametrize("form", ["sentencepiece", "hugging_face"])
def test_unusable_companions_are_named(tmp_path: Path, form: str) -> None:
    def refused(**config: Any) -> str:
        if form == "sentencepiece":
            write_sentencepiece(tmp_path)
            write_json(tmp_path, tokenizer_config=LLAMA | config)
        else:
            write_hugging_face(tmp_path, **config)
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(tmp_path)
        return str(caught.value)

    assert "eos_token='<|typo|>' of the files beside it is not in its vocabulary" in refused(eos_token="<|typo|>")
    assert "bos_token='<|typo|>'" in refused(bos_token="<|typo|>", add_bos_token=True)
    assert re.search(r"add '<.*>' with the id 90\d: the ids in between", refused(added_tokens_decoder=decoder(900)))
    assert "added tokens cannot be read" in refused(added_tokens_decoder=["<|im_start|>"])


def test_a_model_without_a_faithful_form_says_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=prefix, vocab_size=14, model_type="word", hard_vocab_limit=False, minloglevel=2
    )
    write_json(tmp_path, tokenizer_config=LLAMA)
    assert load_tokenizer(tmp_path).content_hash == load_tokenizer(tmp_path / "tokenizer.model").content_hash
    assert "read without tokenizer_config.json" in caplog.text
    write_json(tmp_path, tokenizer_config=LLAMA | {"added_tokens_decoder": decoder(14)})
    with pytest.raises(ConfigError, match=r"give the \.model file itself"):
        load_tokenizer(tmp_path)
