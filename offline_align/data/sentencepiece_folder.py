"""Make a `tokenizer.json` for folders that have only `tokenizer.model` and companions.

The result has the same ids as `transformers`.
"""

import json
from collections.abc import Mapping
from typing import Any

from offline_align.data.companions import HUGGING_FACE_FILE, added_tokens, roles, settings
from offline_align.data.sentencepiece_fast import faithful

_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


def with_tokenizer_json(model: bytes, companions: Mapping[str, bytes]) -> dict[str, bytes] | None:
    """Return the companions with a `tokenizer.json` that replaces the SentencePiece model.

    Texts get SentencePiece's ids. The Llama tokenizer classes have their own rules for the space at
    the start of a text (`add_prefix_space`, `legacy`) and split off user-defined symbols first.

    Some models have no faithful `tokenizer.json`. The result is then None, or ValueError is raised
    if the companions add tokens or change the end of sequence.
    """
    config = settings(companions)
    own = _own_roles(model)
    fast = faithful(model, _prefix(config))
    if fast is None and (added_tokens(config, companions) or roles(own | config)["eos_token"] != own.get("eos_token")):
        raise ValueError(
            "is a SentencePiece model whose ids no tokenizer.json can reproduce, so the tokens that the files "
            "beside it add cannot be used; give the .model file itself to leave them out"
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
    """Return the special tokens of the SentencePiece model itself, by role."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    return {role: str(processor.id_to_piece(token)) for role, token in ids.items() if token >= 0}


def _prefix(config: Mapping[str, Any]) -> str | None:
    """Return when a space is added: "always", "first" or "never"; None for the model's own rule."""
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
