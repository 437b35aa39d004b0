"""Embeddings and tokenizers of different sizes, and ids in the files of a folder without an embedding row."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import ModelSection, Template
from offline_align.convert.source import open_model
from offline_align.convert.token_ids import check_token_ids
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError
from offline_align.model.description import ModelDescription
from tests.small_tokenizers import write_hugging_face

MODEL = ModelSection(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2)


def check(folder: Path, vocab_size: int, **ids: Any) -> None:
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(ids))
    check_token_ids(folder, replace(MODEL, vocab_size=vocab_size), load_tokenizer(folder))


def test_more_rows_than_entries_are_padding_and_fewer_are_refused(tmp_path: Path) -> None:
    size = load_tokenizer(write_hugging_face(tmp_path)).vocab_size
    for rows in (size, size + 1, size + 128):
        check(tmp_path, rows)
    for rows in (size - 1, 2):
        with pytest.raises(ConfigError, match=rf"init\.from: the tokenizer has {size} entries, the model {rows}:"):
            check(tmp_path, rows, eos_token_id=2)
    with pytest.raises(ConfigError, match=r"nor for its end of sequence \(2\)"):
        check(tmp_path, 2)


def test_holes_in_the_ids_count_as_entries(tmp_path: Path) -> None:
    """An embedding needs rows up to the largest id, however many tokens there are."""
    definition = json.loads((write_hugging_face(tmp_path) / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < vocab[last]]
    vocab[last] += 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    check(tmp_path, vocab[last] + 1)
    with pytest.raises(ConfigError, match=rf"tokenizer has {vocab[last] + 1} entries, the model {len(vocab)}:"):
        check(tmp_path, len(vocab))


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_of_the_json_files_lie_in_the_vocabulary(tmp_path: Path, key: str) -> None:
    size = load_tokenizer(write_hugging_face(tmp_path)).vocab_size
    for value in (None, -1, size, [0, size]):
        check(tmp_path, size + 1, **{key: value})
    for value in (size + 1, [0, size + 1]):
        with pytest.raises(ConfigError) as caught:
            check(tmp_path, size + 1, **{key: value})
        assert [problem.partition(" is outside")[0] for problem in caught.value.problems] == [
            f"init.from: {tmp_path / name}: {key}={size + 1}" for name in ("config.json", "generation_config.json")
        ]


def test_our_own_checkpoints_are_checked_too(tmp_path: Path) -> None:
    """Earlier versions could train such checkpoints."""
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "hf"))
    tokenizer.save(tmp_path / "tokenizer")
    for rows, fits in ((tokenizer.vocab_size, True), (tokenizer.vocab_size - 1, False)):
        model = replace(MODEL, vocab_size=rows)
        ModelDescription("reward_model", model, Template.paper, tokenizer.content_hash).save(tmp_path)
        if fits:
            assert open_model(tmp_path).tokenizer.vocab_size == rows
        else:
            with pytest.raises(ConfigError, match="the tokenizer has .* entries, the model"):
                open_model(tmp_path)
