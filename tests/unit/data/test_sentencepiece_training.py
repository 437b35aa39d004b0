"""A trained tokenizer covers any text and is deterministic; an error names the possible vocabulary size."""

from collections.abc import Iterator

import pytest
import sentencepiece

from offline_align.data.sentencepiece_training import train_sentencepiece
from offline_align.errors import ConfigError, DataError

WORDS = ("river", "stone", "quiet", "lantern", "orchard", "winter", "signal", "copper", "marble", "thunder")


def texts() -> Iterator[str]:
    for i, first in enumerate(WORDS):
        for j, second in enumerate(WORDS):
            yield f"The {first} near the {second} has {i * 37 + j} leaves.\nIts {second}s are {first}ish."


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(texts(), 450)


def test_ids_and_size(model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.vocab_size() == 450
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert ids == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "The river near the stone",
        " two  spaces ",
        "naïve 日本 🙂",
        "Tabs\tand\nlines",
        "ﬁ ½ Å",
        "<s></s><unk>",
    ],
)
def test_any_text_survives_unchanged(model: bytes, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.unk_id() not in ids


def test_every_digit_is_a_piece(model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.encode("1234.5", out_type=str) == ["1", "2", "3", "4", ".", "5"]


def test_the_same_texts_give_the_same_bytes(model: bytes) -> None:
    assert train_sentencepiece(texts(), 450) == model


def test_very_long_lines_are_learned_from(model: bytes) -> None:
    assert train_sentencepiece([" ".join(texts()) * 20], 450) != model
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(["zyxwvut " * 10_000 + "quiet stone lantern"], 362)
    )
    assert len(processor.encode("zyxwvut")) == 1


@pytest.mark.parametrize(("size", "advice"), [(100_000, "set it to [0-9]+ or less"), (100, "larger vocabulary")])
def test_an_impossible_vocabulary_names_the_setting(size: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer\.vocab_size={size}: .*{advice}") as error:
        train_sentencepiece(texts(), size)
    assert "\n" not in str(error.value)


def test_no_text_is_bad_data() -> None:
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "\n"], 400)
