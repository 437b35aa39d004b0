"""Check that the embedding of a model has a row for every id that its tokenizer and its folder name."""

import json
from collections.abc import Iterator
from pathlib import Path

from offline_align.config.sections import ModelSection
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError

_FILES = ("config.json", "generation_config.json")
_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_token_ids(folder: Path, model: ModelSection, tokenizer: Tokenizer, tokenizer_key: str = "init.from") -> None:
    """Raise ConfigError if an id of `tokenizer` or of the folder's JSON files has no embedding row.

    Rows without a token are allowed, because many embeddings are larger than their tokenizer.
    """
    assert model.vocab_size is not None
    if tokenizer.vocab_size > model.vocab_size:
        end = f", nor for its end of sequence ({tokenizer.eos_id})" if tokenizer.eos_id >= model.vocab_size else ""
        raise ConfigError(
            f"{tokenizer_key}: the tokenizer has {tokenizer.vocab_size} entries, the model {model.vocab_size}: "
            f"{folder} has no embedding for its last ids{end}; use the tokenizer that the model was trained with, or "
            "resize the model (transformers: resize_token_embeddings) and save both"
        )
    problems = [
        f"init.from: {folder / name}: {key}={token} is outside the model's vocabulary of {model.vocab_size}; "
        "set it to an id of the tokenizer, or to null"
        for name, key, token in _named_ids(folder)
        if token >= model.vocab_size
    ]
    if problems:
        raise ConfigError(problems)


def _named_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (file, key, id) of the special tokens in the JSON files; unreadable files are skipped."""
    for name in _FILES:
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in _KEYS if isinstance(values, dict) else ():
            ids = values.get(key)
            yield from ((name, key, token) for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int)
