"""Conditional Alignment (Eq. 6): train on every row, with its reward as text before the response.

At generation, the same text with another number asks for that reward. This works only if the
number has the same tokens as in training, so the text is checked against the tokenizer first.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from offline_align.config.sections import ConditionalMethodSection
from offline_align.data.condition import Condition, check_format, condition_text
from offline_align.data.records import LabelledSample, Message, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked

logger = logging.getLogger(__name__)


class ContextRenderer(Protocol):
    """The part of a renderer that `check_stable` needs."""

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the token ids of everything before the response."""

    def tail_tokens(self, condition: str) -> int:
        """Return the number of tokens of the generation prompt and the condition."""


def training_rows(
    labelled: Sequence[LabelledSample], settings: ConditionalMethodSection, renderer: Renderer
) -> MethodRows:
    """Return every row conditioned on its reward. Raises as `condition` and `check_stable` do."""
    rewards = [row.reward for row in labelled]
    check_stable(renderer, [*rewards, settings.target_reward], settings.reward_format, settings.reward_limit)

    def finalize(places: Sequence[int]) -> Finalized:
        trained = [rewards[place] for place in places]
        if not min(trained) <= settings.target_reward <= max(trained):
            logger.warning(
                "method.target_reward=%g: rewards of the rows range from %.2f to %.2f, so the policy has to "
                "extrapolate, as in the paper; on little data, ask for a reward in this range",
                settings.target_reward,
                min(trained),
                max(trained),
            )
        return Finalized({"reward_min": min(trained), "reward_max": max(trained)})

    return MethodRows(condition(labelled, settings.reward_format, settings.reward_limit), finalize)


def stored_condition(settings: ConditionalMethodSection) -> Condition:
    """Return the condition that is stored with the policy and that `generate` uses."""
    return Condition(settings.reward_format, settings.reward_limit, settings.target_reward)


def condition(rows: Iterable[LabelledSample], reward_format: str, reward_limit: float) -> list[TrainingRow]:
    """Return all rows, each with its reward as the text before the response (Eq. 6).

    Raises ConfigError for an invalid format or limit, and DataError for unusable rewards.
    """
    check_format(reward_format, reward_limit)
    return [
        TrainingRow(row, condition=condition_text(row.reward, reward_format, reward_limit)) for row in checked(rows)
    ]


def check_stable(renderer: ContextRenderer, rewards: Iterable[float], reward_format: str, reward_limit: float) -> None:
    """Check that the condition texts of `rewards` have different tokens, but equally many.

    Raises ConfigError if two condition texts have the same token ids, if texts with the same sign
    differ in their number of tokens, or if a text changes the token ids of the prompt before it. A
    token may join the text with the end of the generation prompt, if it does so for every text.
    """
    check_format(reward_format, reward_limit)
    prompt = [Message("user", "a")]
    plain = renderer.context(prompt)
    asked = len(plain) - renderer.tail_tokens("")
    kept: int | None = None
    seen: dict[tuple[int, ...], str] = {}
    lengths: dict[bool, tuple[int, str]] = {}
    for negative, text in _texts(rewards, reward_format, reward_limit):
        ids = renderer.context(prompt, text)
        same = next((k for k, (one, two) in enumerate(zip(plain, ids, strict=False)) if one != two), len(plain))
        kept = same if kept is None else kept
        if same != kept or same < asked:
            raise _unstable(reward_format, f"{text!r} changes the tokens of the prompt before it")
        added = tuple(ids[kept:])
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
