import json
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm

from offline_align.data import sentencepiece_fast
from tests.support import real_data_dir

CORPUS = ["The quick brown fox jumps over the lazy dog.", "She sells sea shells.\nTwice 2 is 4."] * 50


def train(path: Path, texts: list[str], **options: Any) -> Path:
    model = BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 340,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **(defaults | options))
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    ("model_type", "byte_fallback", "add_dummy_prefix"),
    list(product(["bpe", "unigram"], [True, False], [True, False])),
)
def test_the_fast_form_gives_the_same_ids(
    tmp_path: Path, model_type: str, byte_fallback: bool, add_dummy_prefix: bool
) -> None:
    path = train(
        tmp_path / "tokenizer.model",
        CORPUS,
        model_type=model_type,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        user_defined_symbols=["<rm_score>", "--", "-->"],
    )
    fast = sentencepiece_fast.convert(path)
    assert fast is not None
    slow = spm.SentencePieceProcessor(model_file=str(path))
    for text in [
        *CORPUS[:2],
        "A new sentence, never seen: 日本 😀!",
        "a-->b --<rm_score>5.0 c",
        *sentencepiece_fast.SAMPLES,
    ]:
        ids = slow.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids
        assert fast.decode(ids, skip_special_tokens=False) == slow.decode(ids) or not byte_fallback


def test_real_text_gives_the_same_ids(tmp_path: Path) -> None:
    with (real_data_dir() / "sft_valid.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(400), file, strict=False)]
    texts = [row["response"] for row in rows]
    path = train(
        tmp_path / "tokenizer.model",
        texts,
        vocab_size=2000,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
    )
    fast = sentencepiece_fast.convert(path)
    assert fast is not None
    slow = spm.SentencePieceProcessor(model_file=str(path))
    found = [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)]
    assert found == slow.encode(texts)


def test_a_model_without_a_faithful_form_gets_none(tmp_path: Path) -> None:
    path = train(tmp_path / "suffix.model", CORPUS, model_type="bpe", treat_whitespace_as_suffix=True)
    assert sentencepiece_fast.convert(path) is None
    path = train(tmp_path / "word.model", CORPUS, model_type="word", vocab_size=20)
    assert sentencepiece_fast.convert(path) is None


def test_differences_are_found(tmp_path: Path) -> None:
    path = train(tmp_path / "one.model", CORPUS, model_type="bpe", vocab_size=340)
    other = train(tmp_path / "two.model", CORPUS[:1], model_type="bpe", vocab_size=60)
    fast = sentencepiece_fast.convert(other)
    assert fast is not None
    assert sentencepiece_fast.first_difference(path, fast) is not None
