"""Write the tokenizer files of an exported folder."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.convert.names import Kind
from offline_align.data import sentencepiece_fast
from offline_align.data.companions import HUGGING_FACE_FILE
from offline_align.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer

logger = logging.getLogger(__name__)

_CLASS = "PreTrainedTokenizerFast"
"""Loads `tokenizer.json` unchanged in transformers 4 and 5, unlike other tokenizer classes."""

# Keys that record how one version loaded the tokenizer, or name classes of one version.
_VERSION_KEYS = {"auto_map", "backend", "is_local", "local_files_only", "name_or_path", "processor_class"}


@dataclass(frozen=True, slots=True)
class Written:
    """The result of `write_tokenizer`."""

    fast: bool
    """Whether there is a `tokenizer.json`."""
    pad_id: int
    """Id of the padding token that `tokenizer_config.json` names."""


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, chat_template: str, max_length: int, kind: Kind, last: frozenset[int]
) -> Written:
    """Write the tokenizer with its `tokenizer_config.json` into `folder`.

    A SentencePiece model also gets a `tokenizer.json`, if one can reproduce its ids. `last` are ids
    that rows can end with, see `padding`.
    """
    tokenizer.save(folder)
    if not (folder / HUGGING_FACE_FILE).is_file():
        _write_fast_form(folder)
    pad_token, pad_id = padding(tokenizer, folder, kind, last)
    config = _settings(folder, max_length) | tokenizer.named_tokens
    config |= {"chat_template": chat_template, "pad_token": pad_token}
    # Either file would take precedence over tokenizer_config.json.
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return Written((folder / HUGGING_FACE_FILE).is_file(), pad_id)


def _settings(folder: Path, max_length: int) -> dict[str, Any]:
    """Return the settings of a saved tokenizer, in keys and values that transformers 4 and 5 both know."""
    found: dict[str, Any] = {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        found |= json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    extra = found.pop("extra_special_tokens", None)
    if isinstance(extra, dict):
        found["extra_special_tokens"] = extra
    elif extra:  # version 5 saves a list, which version 4 knows only by its older name
        found["additional_special_tokens"] = extra
    return {key: value for key, value in found.items() if key not in _VERSION_KEYS} | {"tokenizer_class": _CLASS}


def _write_fast_form(folder: Path) -> None:
    fast = sentencepiece_fast.convert(folder / SENTENCEPIECE_FILE)
    if fast is None:
        logger.warning(
            "%s: no tokenizer.json can reproduce the ids of this SentencePiece model, so none is written; "
            "encode with tokenizer.model",
            folder,
        )
    else:
        (folder / HUGGING_FACE_FILE).write_text(fast.to_str(pretty=True), encoding="utf-8")


def padding(tokenizer: Tokenizer, folder: Path, kind: Kind, last: frozenset[int]) -> tuple[str, int]:
    """Return text and id of a padding token for the tokenizer files in `folder` that is not in `last`.

    `transformers` reads a reward at the last token that is not padding, so padding must not be a
    token that a row can end with. The choice is a special token, preferably the tokenizer's own
    padding. If every special token can end a row, a policy is padded with end of sequence, because
    nothing is read from it that way. A reward model is padded with the longest token of its
    vocabulary: from then on its text means padding, but so long a token is very rare in real text.
    """
    vocabulary, special = _vocabulary(folder)
    own = {text: token for text, token in vocabulary.items() if token not in last}
    by_role = [tokenizer.named_tokens.get(role) for role in ("pad_token", "bos_token", "unk_token")]
    others = sorted(special, key=lambda text: ("pad" not in text.lower(), vocabulary[text]))
    for text in (*by_role, *others):
        if text in own:
            return str(text), own[text]
    if kind == "policy":
        return tokenizer.named_tokens["eos_token"], tokenizer.eos_id
    longest = max(own, key=lambda text: (len(text), -own[text]))
    return longest, own[longest]


def _vocabulary(folder: Path) -> tuple[dict[str, int], set[str]]:
    """Return the ids of all tokens by text, and the texts of the special tokens."""
    if (folder / HUGGING_FACE_FILE).is_file():
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(folder / HUGGING_FACE_FILE))
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        return backend.get_vocab(with_added_tokens=True), special
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    pieces = {model.id_to_piece(token): token for token in range(model.get_piece_size())}
    return pieces, {text for text, token in pieces.items() if model.is_control(token)}


def is_replaced(folder: Path, tokenizer: Tokenizer) -> bool:
    """Return whether the ids of `AutoTokenizer` differ from those of the `tokenizer.json` in `folder`.

    For some families (Qwen2), version 5 uses the family's tokenizer class whatever
    `tokenizer_config.json` names, and that class reads only vocabulary and merges from the file.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    texts = sentencepiece_fast.SAMPLES
    return any(loaded.encode(t, add_special_tokens=False) != tokenizer.encode(t, special=True) for t in texts)
