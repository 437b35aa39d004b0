"""Tokenizer files of an exported folder, and the check that `transformers` reads the same ids from them."""

import json
import logging
from pathlib import Path
from typing import Any

from offline_align.convert import sentencepiece_fast
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer

logger = logging.getLogger(__name__)

_DIALOGUES = (
    (Message("user", "What is the capital of France?"),),
    (Message("user", "Hi, who are you?\n"), Message("assistant", "A model."), Message("user", "2 + 2 = ?")),
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str, max_length: int) -> bool:
    """Write the tokenizer with its `tokenizer_config.json` into `folder`.

    A SentencePiece model also gets a `tokenizer.json`, where one gives the same ids.
    Returns whether there is one.
    """
    tokenizer.save(folder)
    # It would take precedence over the template in tokenizer_config.json.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if not (folder / HUGGING_FACE_FILE).is_file():
        _write_fast_form(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _plain_config(max_length)
    config |= tokenizer.named_tokens | {"chat_template": chat_template}
    if config.get("pad_token") in (None, config["eos_token"]) and "bos_token" in tokenizer.named_tokens:
        config["pad_token"] = tokenizer.named_tokens["bos_token"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return (folder / HUGGING_FACE_FILE).is_file()


def _plain_config(max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }


def _write_fast_form(folder: Path) -> None:
    fast = sentencepiece_fast.convert(folder / SENTENCEPIECE_FILE)
    if fast is None:
        logger.warning(
            "%s: no tokenizer.json gives the ids of this SentencePiece model, so none is written; "
            "encode with tokenizer.model",
            folder,
        )
    else:
        (folder / HUGGING_FACE_FILE).write_text(fast.to_str(pretty=True), encoding="utf-8")


def padding_id(tokenizer: Tokenizer) -> int:
    """Return an id for padding that is not end of sequence.

    `transformers` reads a reward at the last token that is not padding, we at end of sequence, the last token
    of every row: the two agree for any padding but end of sequence.
    """
    candidates = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size - 1, tokenizer.vocab_size - 2)
    return next(token for token in candidates if token is not None and token != tokenizer.eos_id)


def first_prompt_difference(folder: Path, renderer: Renderer, condition: str) -> str | None:
    """Return the first sample dialogue that `transformers` encodes otherwise than `renderer`, or None.

    They can differ where a token of the exported tokenizer reaches over the boundary of two turns, or of the
    prompt and the condition: we encode each by itself.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    for dialogue in _DIALOGUES:
        turns = [{"role": message.role, "content": message.content} for message in dialogue]
        text = loaded.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if loaded.encode(text, add_special_tokens=False) != renderer.context(dialogue, condition):
            return str(text)
    return None
