"""Anthropic HH-RLHF: transcripts `chosen` and `rejected`, which should differ only in the last answer."""

import re
from typing import Any

from offline_align.data.adapters.columns import DroppedRow, further, text_column

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pair of two transcripts; raises DroppedRow if they differ before the last answer."""
    sides = [text_column(columns, "chosen"), text_column(columns, "rejected")]
    rest = further(columns, ("chosen", "rejected"), sides)
    chosen, rejected = map(_turns, sides)
    if chosen[:-1] != rejected[:-1]:
        raise DroppedRow("hh: the sides differ before the last answer")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise DroppedRow("hh: the last turn is not an answer")
    return [{"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"], **rest}]


def _turns(transcript: str) -> list[dict[str, str]]:
    before, *parts = TURN.split(transcript)
    if before.strip() or not parts:
        raise DroppedRow("hh: not a transcript of Human and Assistant")
    return [
        {"role": ROLES[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
