"""Deduplication, and a training/validation split in which no prompt is on both sides."""

import hashlib
from typing import Any


def normalised(text: str) -> str:
    """Return text with white space collapsed and case folded."""
    return " ".join(text.split()).casefold()


def answers(row: dict[str, Any]) -> dict[str, str]:
    """Return the answers of a row by column; a `response` in a pair is not an answer."""
    return {name: row[name] for name in ("chosen", "rejected") if name in row} or {"response": row["response"]}


def content_digest(row: dict[str, Any]) -> bytes:
    """Return a digest that is equal for rows whose prompt and answers are equal after `normalised`."""
    prompt = row["prompt"]
    messages = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
    digest = hashlib.sha256()
    for name, text in [*messages, *answers(row).items()]:
        digest.update(f"{name}\0{normalised(text)}\0".encode())
    return digest.digest()


def first_user_message(row: dict[str, Any]) -> str:
    """Return the first user message of the prompt."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return next(str(message["content"]) for message in prompt if message["role"] == "user")


def is_validation(row: dict[str, Any], seed: int, valid_fraction: float) -> bool:
    """Return whether a row belongs to validation, which depends only on seed and first user message.

    All rows of a dialogue or prompt, SFT rows and pairs alike, are therefore on the same side, on
    every machine and whatever else is read.
    """
    text = normalised(first_user_message(row))
    digest = hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < valid_fraction * 2**64
