"""Companion files of a tokenizer, applied in the same order as in `transformers`.

`tokenizer_config.json` may hold the added tokens (`added_tokens_decoder`). If it does not,
`special_tokens_map.json` overrides its settings, and `added_tokens.json` holds the added tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HUGGING_FACE_FILE = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files beside a tokenizer that name its special tokens, its added tokens and its chat template."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the JSON object of a file, or an empty one if the file is missing; raises ValueError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the settings of `tokenizer_config.json` and `special_tokens_map.json`; raises ValueError."""
    config = json_object(files, "tokenizer_config.json")
    return config if "added_tokens_decoder" in config else config | json_object(files, "special_tokens_map.json")


def roles(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that the settings name, by role (`eos_token`, ...)."""
    named = {}
    for role, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(text, str):
            named[role] = text
    return named


def with_added_tokens(
    definition: dict[str, Any], config: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return a `tokenizer.json` with the tokens that its companions add, or whose flags they change.

    Raises ValueError if the stated id of a new token is not the next free id.
    """
    from tokenizers import AddedToken, Tokenizer

    known = {token["content"]: token for token in definition.get("added_tokens") or []}
    new = [token for token in added_tokens(config, files) if not _same(token, known.get(token["content"]))]
    vocabulary = definition.get("model", {}).get("vocab") or {}
    ordinary = set(vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary))
    named = [*roles(config).values(), *_listed(config)]
    stated = {token["content"] for token in new} | known.keys()
    # As in transformers, a token without a stated id is added if a list names it, but not for a role.
    new += [
        {"content": text, "normalized": False, "special": True}
        for text in dict.fromkeys(named)
        if text not in stated and (text in ordinary or text in _listed(config))
    ]
    if not new:
        return definition
    backend = Tokenizer.from_str(json.dumps(definition))
    for token in new:
        if backend.token_to_id(token["content"]) is None:
            _check_place(token, backend.get_vocab_size(with_added_tokens=True))
        backend.add_tokens([AddedToken(token["content"], **{k: token[k] for k in _FLAGS if k in token})])
    changed: dict[str, Any] = json.loads(backend.to_str())
    return changed


def _check_place(token: Mapping[str, Any], free: int) -> None:
    if token.get("id", free) != free:
        raise ValueError(
            f"has {free} entries, and the files beside it add {token['content']!r} with the id {token['id']}: "
            "the ids in between are missing; save the tokenizer again"
        )


def _same(token: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    return other is not None and all(bool(token.get(flag)) == bool(other.get(flag)) for flag in _FLAGS)


def added_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the companions' added tokens (`id`, `content`, flags), sorted by id; raises ValueError."""
    try:
        return sorted(_added(config, files), key=lambda token: int(token["id"]))
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"has files beside it whose added tokens cannot be read ({error!r})") from error


def _added(config: Mapping[str, Any], files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    if "added_tokens_decoder" in config:
        for number, token in config["added_tokens_decoder"].items():
            yield {"id": int(number), "content": str(token["content"])} | {k: bool(token.get(k)) for k in _FLAGS}
        return
    special = {*roles(config).values(), *_listed(config)}
    in_file = {token["content"] for token in json_object(files, HUGGING_FACE_FILE).get("added_tokens") or []}
    for text, number in json_object(files, "added_tokens.json").items():
        if text not in in_file:  # else the flags in tokenizer.json apply
            yield {"id": number, "content": text, "normalized": text not in special, "special": text in special}


def _listed(config: Mapping[str, Any]) -> list[str]:
    """Return the special tokens without a role."""
    found: list[str] = []
    for name in _LISTS:
        value = config.get(name) or []
        entries: Iterable[Any] = value.values() if isinstance(value, dict) else value
        found += [str(entry["content"] if isinstance(entry, dict) else entry) for entry in entries]
    return found
