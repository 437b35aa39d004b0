"""Tokenizers: ids, special strings in text, files, and all kinds of unusable files."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError, StorageError
from tests.small_tokenizers import CHATML, SPECIALS, write_hugging_face, write_sentencepiece

TEXTS = [
    "plain text",
    "  two spaces,\n\na blank line\tand a tab ",
    "日本語 and 🦊 and \u0301",
    "</s><s><|im_end|> <rm_score>5.0 <ctl> <0x41>",
    "",
]


@pytest.fixture(params=["sentencepiece_bpe", "sentencepiece_unigram", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "hugging_face":
        return load_tokenizer(write_hugging_face(tmp_path / "hf"))
    return load_tokenizer(write_sentencepiece(tmp_path / "sp", kind=request.param.split("_")[1]))


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_give_the_same_ids(tokenizer: Tokenizer) -> None:
    for special in (False, True):
        assert tokenizer.encode_batch(TEXTS, special) == [tokenizer.encode(text, special) for text in TEXTS]


def test_special_strings_in_text_stay_text(tokenizer: Tokenizer) -> None:
    special_ids = {tokenizer.encode(text, special=True)[-1] for text in tokenizer.special_texts}
    special_ids |= {tokenizer.eos_id}
    text = "a".join(["", *tokenizer.special_texts, "</s>", "<s>", ""])
    assert tokenizer.special_texts
    assert not special_ids & set(tokenizer.encode(text))
    assert special_ids & set(tokenizer.encode(text, special=True))


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox")
    assert tokenizer.bos_id is not None
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "fox"


def test_ids_fit_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = [i for text in TEXTS for i in tokenizer.encode(text, special=True)]
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.pad_id is None or tokenizer.pad_id != tokenizer.eos_id


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    copy = load_tokenizer(tmp_path / "saved")
    text = "</s> <|im_end|> fox <rm_score>5.0"
    assert copy.content_hash == tokenizer.content_hash
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert (copy.eos_id, copy.bos_id, copy.pad_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    assert (copy.vocab_size, copy.chat_template) == (tokenizer.vocab_size, tokenizer.chat_template)


def test_saving_survives_the_loss_of_the_original(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(path)
    path.unlink()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").content_hash == tokenizer.content_hash


def test_unwritable_folder_is_a_storage_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the tokenizer"):
        tokenizer.save(tmp_path / "file")


def test_stock_ids_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_hugging_face(tmp_path)
    stock = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in ("plain text", "  two\n\nlines ", "日本語 🦊"):
        assert ours.encode(text) == stock.encode(text, add_special_tokens=False)
    text = "a<|im_end|>b"
    assert ours.encode(text, special=True) == stock.encode(text, add_special_tokens=False)
    assert (ours.eos_id, ours.bos_id, ours.pad_id) == (
        stock.eos_token_id,
        stock.bos_token_id,
        stock.pad_token_id,
    )


def test_stock_ids_of_sentencepiece(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    path = write_sentencepiece(tmp_path, lossy=True)
    stock = SentencePieceProcessor(model_file=str(path))
    for text in ("plain text", "  two\n\nlines ", "日本語 🦊", "ﬁne"):
        assert load_tokenizer(path).encode(text) == stock.encode(text)


def test_other_user_defined_symbols_stay_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path))
    assert tokenizer.special_texts == ("<rm_score>",)
    assert len(tokenizer.encode("a-->")) == len(tokenizer.encode("a")) + 1


@pytest.mark.parametrize("where", ["file", "folder"])
def test_both_forms_by_file_and_folder(where: str, tmp_path: Path) -> None:
    model, folder = write_sentencepiece(tmp_path / "sp"), write_hugging_face(tmp_path / "hf")
    paths = [model, folder / "tokenizer.json"] if where == "file" else [tmp_path / "sp", folder]
    first, second = (load_tokenizer(str(path)) for path in paths)
    assert first.chat_template is None
    assert second.chat_template == CHATML


def test_a_folder_with_both_is_read_by_tokenizer_json(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_hugging_face(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHATML


def test_model_file_of_another_name(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path).rename(tmp_path / "spiece.model")
    assert load_tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize(("setting", "adds"), [(None, True), (True, True), (False, False)])
def test_bos_by_the_rules_of_the_file(setting: bool | None, adds: bool, tmp_path: Path) -> None:
    config = {} if setting is None else {"add_bos_token": setting}
    assert load_tokenizer(write_hugging_face(tmp_path, adds_bos=True, **config)).adds_bos is adds


def test_no_bos_without_a_rule(tmp_path: Path) -> None:
    assert load_tokenizer(write_hugging_face(tmp_path / "hf")).adds_bos is False
    assert load_tokenizer(write_sentencepiece(tmp_path / "sp")).adds_bos is False


def test_saved_truncation_and_padding_are_off(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    folder = write_hugging_face(tmp_path)
    before = load_tokenizer(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    after = load_tokenizer(folder)
    text = "a long text of many more than eight tokens, with no end in sight"
    assert after.encode(text) == before.encode(text)
    assert after.content_hash == before.content_hash


def test_named_tokens_are_special_even_if_not_flagged(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, eos_token="<rm_score>")
    tokenizer = load_tokenizer(folder)
    assert "<rm_score>" in tokenizer.special_texts
    assert tokenizer.eos_id not in tokenizer.encode("a<rm_score>b")


def test_hash_follows_what_determines_ids(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"eos_token": "<|pad|>"},
        {"chat_template": "x"},
        {"add_bos_token": True},
        {"model_max_length": 7},
    ]
    hashes = []
    for i, config in enumerate(variants):
        folder = tmp_path / str(i)
        write_hugging_face(folder, **config)
        hashes.append(load_tokenizer(folder).content_hash)
    assert hashes[0] == hashes[4]
    assert len(set(hashes)) == 4


def test_special_tokens_map_and_template_file(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    (folder / "chat_template.jinja").write_text("from a file")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.named_tokens == {"eos_token": "<|pad|>"}
    assert tokenizer.chat_template == "from a file"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").content_hash == tokenizer.content_hash


def test_named_templates_give_the_default_one(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "dialogue"}]
    tokenizer = load_tokenizer(write_hugging_face(tmp_path, chat_template=listed))
    assert tokenizer.chat_template == "dialogue"


def test_bare_file_finds_the_usual_end_of_sequence(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder / "tokenizer.json").eos_id == SPECIALS.index("<|im_end|>")


def test_no_end_of_sequence_is_refused(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path / "hf", eos_token=None)
    content = (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|else|>")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model.tokenizer=.*no end of sequence"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"model.tokenizer=.*no end-of-sequence piece"):
        load_tokenizer(write_sentencepiece(tmp_path / "sp", eos_id=-1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model at all"),
        ("tokenizer.model", b"\x80\x04\x95cposix\nsystem\n"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[1, 2]"),
        ("tokenizer.json", b'{"model": {"type": "Nothing"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.txt", b"words"),
    ],
)
def test_unusable_files_are_configuration_errors(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.tokenizer="):
        load_tokenizer(tmp_path / name)


def test_a_cut_model_file_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ConfigError, match=r"model.tokenizer="):
        load_tokenizer(path)


def test_missing_and_empty_places_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path, "some-org/some-model"):
        with pytest.raises(ConfigError, match=r"model.tokenizer="):
            load_tokenizer(place)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = write_hugging_face(tmp_path, auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert load_tokenizer(folder).eos_id == SPECIALS.index("<|im_end|>")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", [write_hugging_face, write_sentencepiece])
def test_equal_files_are_built_once_and_changed_files_again(tmp_path: Path, write: Any) -> None:
    first, copy = (load_tokenizer(write(tmp_path / name)) for name in ("a", "b"))
    assert first is copy
    changed = write_hugging_face(tmp_path / "b", adds_bos=True) if write is write_hugging_face else None
    if changed is not None:
        assert load_tokenizer(changed).content_hash != first.content_hash
