"""Conditional Alignment (Eq. 6): learn every row given its reward, written right before the response.

At generation the same text asks for a reward of choice. It works only if the model meets the same
tokens then, so the text is checked against the tokenizer before anything is trained.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from offline_align.config.sections import ConditionalMethodSection
from offline_align.data.condition import Condition, check_format, condition_text
from offline_align.data.records import LabelledSample, Message, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked


class ContextRenderer(Protocol):
    """What `check_stable` needs of a renderer."""

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the ids of all that stands before the response."""


def training_rows(
    labelled: Sequence[LabelledSample], settings: ConditionalMethodSection, renderer: Renderer
) -> MethodRows:
    """Return every row under its own reward; raises as `condition` and `check_stable`."""
    rewards = [row.reward for row in labelled]
    check_stable(renderer, [*rewards, settings.target_reward], settings.reward_format, settings.reward_limit)

    def finalize(places: Sequence[int]) -> Finalized:
        trained = [rewards[place] for place in places]
        return Finalized({"reward_min": min(trained), "reward_max": max(trained)})

    return MethodRows(condition(labelled, settings.reward_format, settings.reward_limit), finalize)


def stored_condition(settings: ConditionalMethodSection) -> Condition:
    """Return the condition that the policy stores, for `generate` to ask with."""
    return Condition(settings.reward_format, settings.reward_limit, settings.target_reward)


def condition(rows: Iterable[LabelledSample], reward_format: str, reward_limit: float) -> list[TrainingRow]:
    """Return all rows, each with its reward as the text before the response (Eq. 6).

    Raises ConfigError for a format or limit that cannot work, DataError for unusable rewards.
    """
    check_format(reward_format, reward_limit)
    return [
        TrainingRow(row, condition=condition_text(row.reward, reward_format, reward_limit)) for row in checked(rows)
    ]


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
