"""Folders with `tokenizer.model` and companions but no `tokenizer.json`: it is made, with the ids of `transformers`."""

import json
from collections.abc import Mapping
from typing import Any

from offline_align.data.companions import HUGGING_FACE_FILE, added_tokens, roles, settings
from offline_align.data.sentencepiece_fast import faithful

_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def with_tokenizer_json(model: bytes, companions: Mapping[str, bytes]) -> dict[str, bytes] | None:
    """Return the files of a SentencePiece model and its companions with a `tokenizer.json` in place of the model.

    Texts get SentencePiece's ids. The classes of Llama have rules of their own for the space in front of a text
    (`add_prefix_space`, `legacy`) and take user-defined symbols out of a text before anything else. No `tokenizer.json`
    is faithful to some models: None if the companions of such a one add no token and move no end of sequence, else
    ValueError.
    """
    config = settings(companions)
    own = _own_roles(model)
    fast = faithful(model, _prefix(config))
    if fast is None and (added_tokens(config, companions) or roles(own | config)["eos_token"] != own.get("eos_token")):
        raise ValueError(
            "is a SentencePiece model that no tokenizer.json gives the ids of, so the tokens that the files beside it "
            "add cannot be used; give the .model file itself to leave them out"
        )
    if fast is None:
        return None
    config = own | config | {"add_bos_token": config.get("add_bos_token") is True}
    begin = roles(config).get("bos_token")
    if config["add_bos_token"] and begin is not None:
        fast.post_processor = _begins_with(begin, fast.token_to_id(begin))
    written = json.dumps(config, ensure_ascii=False).encode()
    return dict(companions) | {HUGGING_FACE_FILE: fast.to_str().encode(), "tokenizer_config.json": written}


def _own_roles(model: bytes) -> dict[str, str]:
    """Return the special tokens by role that the SentencePiece model itself knows."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return {role: str(processor.id_to_piece(token)) for role, token in ids.items() if token >= 0}


def _prefix(config: Mapping[str, Any]) -> str | None:
    """Return when a space is put in front: "always", "first" or "never"; None for the model's own rule."""
    if config.get("tokenizer_class") not in _LLAMA:
        return None
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def _begins_with(text: str, token: int | None) -> Any:
    from tokenizers import processors

    if token is None:
        raise ValueError(f"bos_token={text!r} of the files beside it is not in its vocabulary; name a token that is")
    pair = f"{text}:0 $A:0 {text}:1 $B:1"
    return processors.TemplateProcessing(single=f"{text}:0 $A:0", pair=pair, special_tokens=[(text, token)])
