"""Conditional Alignment (Eq. 6): learn every row given its reward, written right before the response.

At generation the same text asks for a reward of choice. It works only if the model meets the same
tokens then, so the text is checked against the tokenizer before anything is trained.
"""

import math
import re
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Protocol

from offline_align.data.records import LabelledSample, Message
from offline_align.errors import ConfigError
from offline_align.methods import TrainingRow, checked


class ContextRenderer(Protocol):
    """What `check_stable` needs of a renderer."""

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the ids of all that stands before the response."""


def condition(rows: Iterable[LabelledSample], reward_format: str, reward_limit: float) -> list[TrainingRow]:
    """Return all rows, each with its reward as the text before the response (Eq. 6).

    Raises ConfigError for a format or limit that cannot work, DataError for unusable rewards.
    """
    check_format(reward_format, reward_limit)
    return [
        TrainingRow(row, condition=condition_text(row.reward, reward_format, reward_limit)) for row in checked(rows)
    ]


def condition_text(reward: float, reward_format: str, reward_limit: float) -> str:
    """Return the condition for a normalised reward, clipped to plus or minus the limit.

    Small negative rewards are written as zero: `0.0`, never `-0.0`.
    """
    text = reward_format.format(reward=min(max(reward, -reward_limit), reward_limit))
    return reward_format.format(reward=0.0) if text == reward_format.format(reward=-0.0) else text


def check_format(reward_format: str, reward_limit: float) -> None:
    """Raise ConfigError unless the format writes rewards apart by their value and the limit is positive."""
    problems = []
    if not 0 < reward_limit < math.inf:
        problems.append(f"method.reward_limit={reward_limit}: needs a positive number, such as 9.9")
    if (problem := _format_problem(reward_format)) is not None:
        problems.append(
            f"method.reward_format={reward_format!r}: {problem}; write a marker and the field, "
            "such as <rm_score>{reward:.1f}"
        )
    if problems:
        raise ConfigError(problems)


def _format_problem(reward_format: str) -> str | None:
    try:
        fields = [(name, spec or "") for _, name, spec, _ in Formatter().parse(reward_format) if name is not None]
        if [name for name, _ in fields] != ["reward"]:
            return "needs the field {reward} once and no other"
        if re.search(r"\d{3}", fields[0][1]):
            return "writes a number of a hundred digits or more"
        if len({reward_format.format(reward=value) for value in (-1.0, 0.0, 1.0)}) < 3:
            return "writes the rewards -1, 0 and 1 alike"
    except (ValueError, LookupError, AttributeError) as error:
        return f"cannot be filled in ({error})"
    return None


def check_stable(renderer: ContextRenderer, rewards: Iterable[float], reward_format: str, reward_limit: float) -> None:
    """Raise ConfigError unless every condition text has its own ids, as many as the others of its sign.

    `rewards` are those that occur, and the target. A condition must also leave the ids before it alone.
    """
    check_format(reward_format, reward_limit)
    prompt = [Message("user", "a")]
    plain = renderer.context(prompt)
    seen: dict[tuple[int, ...], str] = {}
    lengths: dict[bool, tuple[int, str]] = {}
    for negative, text in _texts(rewards, reward_format, reward_limit):
        ids = renderer.context(prompt, text)
        if ids[: len(plain)] != plain:
            raise _unstable(reward_format, f"{text!r} changes the tokens of the prompt before it")
        added = tuple(ids[len(plain) :])
        if (other := seen.setdefault(added, text)) != text:
            raise _unstable(reward_format, f"{text!r} and {other!r} are the same tokens")
        length, other = lengths.setdefault(negative, (len(added), text))
        if length != len(added):
            raise _unstable(reward_format, f"{text!r} takes {len(added)} tokens but {other!r} takes {length}")


def _texts(rewards: Iterable[float], reward_format: str, limit: float) -> list[tuple[bool, str]]:
    """Return every distinct condition text, and whether the reward in it is below zero."""
    zero = reward_format.format(reward=0.0)
    texts = {condition_text(reward, reward_format, limit): reward < 0 for reward in rewards}
    return [(negative and text != zero, text) for text, negative in texts.items()]


def _unstable(reward_format: str, problem: str) -> ConfigError:
    return ConfigError(
        f"method.reward_format={reward_format!r}: {problem}; lower method.reward_limit to 9.9 or less, "
        "choose another format, or a tokenizer that splits digits"
    )
