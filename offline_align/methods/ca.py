"""Conditional Alignment (Eq. 6): train on every row, with its reward as text before the response.

At generation, the same text with another number asks for that reward. This works only if the
number has the same tokens as in training, so the text is checked against the tokenizer first.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from offline_align.config.sections import ConditionalMethodSection
from offline_align.data.condition import Condition, QuantileCondition
from offline_align.data.records import LabelledSample, Message, TrainingRow
from offline_align.data.template import Renderer
from offline_align.errors import ConfigError
from offline_align.methods import Finalized, MethodRows, checked, conditions, rwr
from offline_align.methods.conditions import Fitted

logger = logging.getLogger(__name__)


class ContextRenderer(Protocol):
    """The part of a renderer that `check_stable` needs."""

    def context(self, prompt: Sequence[Message], condition: str = "") -> list[int]:
        """Return the token ids of everything before the response."""

    def tail_tokens(self, condition: str) -> int:
        """Return the number of tokens of the generation prompt and the condition."""


def fit(labelled: Sequence[LabelledSample], settings: ConditionalMethodSection, seed: int) -> Fitted:
    """Return what the training rows determine.

    Raises DataError for unusable rewards, and ConfigError as `conditions.fit` does.
    """
    fitted = conditions.fit(checked(labelled), settings, seed)
    condition = fitted.condition
    if isinstance(condition, QuantileCondition) and condition.quantiles < settings.quantiles:
        logger.warning(
            "method.quantiles=%d: many rewards are equal, so there are only %d", settings.quantiles, condition.quantiles
        )
    return fitted


def training_rows(labelled: Sequence[LabelledSample], fitted: Fitted, renderer: Renderer) -> MethodRows:
    """Return every row conditioned on its reward, with a `finalize` that weighs them if the method does.

    `fitted` is that of `fit`, or for validation rows the one that `finalize` returned for the training
    rows. Raises as `condition` and `check_stable` do.
    """
    rows = condition(labelled, fitted)
    written = [(row.reward, number) for row in labelled for number in fitted.numbers(row)]
    check_stable(renderer, fitted.condition, [*(number for _, number in written), fitted.condition.target])

    def finalize(places: Sequence[int]) -> Finalized:
        rewards, numbers = zip(*(written[place] for place in places), strict=True)
        if fitted.is_final:
            return Finalized(weights=fitted.weights(rewards))
        final = fitted.finalized(rewards)
        facts, weights = _facts(final, rewards, numbers), final.weights(rewards)
        return Finalized(facts | (rwr.weight_facts(weights) if weights else {}), weights, final)

    return MethodRows(rows, finalize)


def condition(rows: Iterable[LabelledSample], fitted: Fitted) -> list[TrainingRow]:
    """Return all rows, each with its reward as the text before the response (Eq. 6).

    A row with several bounds occurs once for each, side by side. Raises DataError for unusable rewards.
    """
    return [
        TrainingRow(row, condition=fitted.condition.text_of(number))
        for row in checked(rows)
        for number in fitted.numbers(row)
    ]


def stored_condition(fitted: Fitted) -> Condition:
    """Return the condition that is stored with the policy and that `generate` uses."""
    return fitted.condition


def _facts(fitted: Fitted, rewards: Sequence[float], numbers: Sequence[float]) -> dict[str, Any]:
    """Return the facts about the rows that are trained on; warn of a target that none of them has."""
    facts: dict[str, Any] = {"reward_min": min(rewards), "reward_max": max(rewards)}
    if isinstance(fitted.condition, QuantileCondition):
        rows = Counter(numbers)
        return facts | {"quantile_rows": [rows[number] for number in range(1, fitted.condition.quantiles + 1)]}
    least, most, target = min(numbers), max(numbers), fitted.condition.target
    if not least <= target <= most:
        logger.warning(
            "method.target_reward=%g: %s of the rows range from %.2f to %.2f, so the policy has to "
            "extrapolate, as in the paper; on little data, ask for a reward in this range",
            target,
            "bounds" if fitted.bounds else "rewards",
            least,
            most,
        )
    return facts | ({"bound_min": least, "bound_max": most} if fitted.bounds else {})


def check_stable(renderer: ContextRenderer, condition: Condition, numbers: Iterable[float]) -> None:
    """Check that the condition texts of `numbers` have different tokens, but equally many.

    Raises ConfigError if two condition texts have the same token ids, if texts with the same sign
    differ in their number of tokens, or if a text changes the token ids of the prompt before it. A
    token may join the text with the end of the generation prompt, if it does so for every text.
    """
    prompt = [Message("user", "a")]
    plain = renderer.context(prompt)
    asked = len(plain) - renderer.tail_tokens("")
    kept: int | None = None
    seen: dict[tuple[int, ...], str] = {}
    lengths: dict[bool, tuple[int, str]] = {}
    for negative, text in _texts(condition, numbers):
        ids = renderer.context(prompt, text)
        same = next((k for k, (one, two) in enumerate(zip(plain, ids, strict=False)) if one != two), len(plain))
        kept = same if kept is None else kept
        if same != kept or same < asked:
            raise _unstable(condition, f"{text!r} changes the tokens of the prompt before it")
        added = tuple(ids[kept:])
        if (other := seen.setdefault(added, text)) != text:
            raise _unstable(condition, f"{text!r} and {other!r} are the same tokens")
        length, other = lengths.setdefault(negative, (len(added), text))
        if length != len(added):
            raise _unstable(condition, f"{text!r} takes {len(added)} tokens but {other!r} takes {length}")


def _texts(condition: Condition, numbers: Iterable[float]) -> list[tuple[bool, str]]:
    """Return every distinct condition text, and whether the number in it is below zero."""
    texts = {condition.text_of(number): number < 0 for number in numbers}
    zero = condition.text_of(0.0)
    return [(negative and text != zero, text) for text, negative in texts.items()]


def _unstable(condition: Condition, problem: str) -> ConfigError:
    return ConfigError(f"{condition.key}={condition.format!r}: {problem}; {condition.advice}")
