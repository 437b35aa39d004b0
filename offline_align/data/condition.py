"""The text before a response that states its reward (Conditional Alignment, Eq. 6).

A condition is stored with the policy, and `generate` asks with it. It has one of three kinds: the reward
itself, a bound that the reward reaches, or the number of its quantile.
"""

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise
from string import Formatter
from typing import Any, ClassVar

from offline_align.errors import ConfigError


@dataclass(frozen=True)
class Condition(ABC):
    """How a number becomes the text before a response, and the number that generation asks for.

    `asdict` of a condition is what files store.
    """

    key: ClassVar[str]
    """The key of the format, for messages."""
    advice: ClassVar[str]
    """What to change if the tokenizer does not suit the texts."""

    @property
    @abstractmethod
    def target(self) -> float:
        """The number that generation asks for: a normalised reward, or the number of a quantile."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The format of the text."""

    @abstractmethod
    def text_of(self, number: float) -> str:
        """Return the text that states `number`."""

    @abstractmethod
    def asking(self, target: float) -> "Condition":
        """Return the condition with another target.

        Raises ConfigError, naming `method.target_reward`, if the policy cannot be asked for it.
        """

    @abstractmethod
    def reward_of(self, target: float) -> float:
        """Return the normalised reward that a target stands for."""

    @property
    @abstractmethod
    def meaning(self) -> str:
        """What the text says of an answer, and which other texts there are, for the model card."""

    @property
    def text(self) -> str:
        """The text that asks for the target."""
        return self.text_of(self.target)

    @staticmethod
    def from_values(values: Any) -> "Condition | None":
        """Return the condition stored in a file, or None; raises ValueError if it is invalid.

        Files of earlier versions have no `kind`, which means that the text is the reward itself.
        """
        if not values:
            return None
        try:
            return _KINDS[values.get("kind", "value")]._read(values)
        except (TypeError, LookupError, AttributeError, ValueError, ConfigError) as error:
            raise ValueError(f"the condition {values!r} cannot be used: {error}") from error

    @classmethod
    @abstractmethod
    def _read(cls, values: Any) -> "Condition":
        """Return a stored condition of this kind."""


@dataclass(frozen=True)
class ValueCondition(Condition):
    """The reward of the answer (Eq. 6), clipped to plus or minus the limit."""

    reward_format: str
    reward_limit: float
    target_reward: float

    key: ClassVar[str] = "method.reward_format"
    advice: ClassVar[str] = (
        "lower method.reward_limit to 9.9 or less, choose another format, or a tokenizer that splits digits"
    )

    @property
    def target(self) -> float:
        """The target reward."""
        return self.target_reward

    @property
    def format(self) -> str:
        """The format of a reward."""
        return self.reward_format

    def text_of(self, number: float) -> str:
        """Return the text of a normalised reward."""
        return condition_text(number, self.reward_format, self.reward_limit)

    def asking(self, target: float) -> "ValueCondition":
        """Return the condition with another target reward, which must not exceed the limit."""
        if not abs(target) <= self.reward_limit:
            raise ConfigError(
                f"method.target_reward={target}: the policy was trained with rewards clipped to plus or minus "
                f"{self.reward_limit}; ask for one within them"
            )
        return replace(self, target_reward=target)

    def reward_of(self, target: float) -> float:
        """Return the target, which is a reward."""
        return target

    @property
    def meaning(self) -> str:
        """What the model card says."""
        return (
            f"The response is conditioned on the reward: the prompt ends with `{self.text}`. Write another "
            "number there to ask for another reward."
        )

    @classmethod
    def _read(cls, values: Any) -> "ValueCondition":
        condition = cls(str(values["reward_format"]), float(values["reward_limit"]), float(values["target_reward"]))
        check_format(condition.reward_format, condition.reward_limit)
        return condition


@dataclass(frozen=True)
class AtLeastCondition(ValueCondition):
    """A bound that the reward of the answer reaches, clipped to plus or minus the limit."""

    kind: str = "at_least"

    @property
    def meaning(self) -> str:
        """What the model card says."""
        return (
            f"The response is conditioned on a bound that its reward reaches: the prompt ends with `{self.text}`, "
            "which asks for at least this reward. Write another number there for another bound."
        )


@dataclass(frozen=True)
class QuantileCondition(Condition):
    """The number of the quantile in which the reward lies, 1 for the lowest rewards."""

    quantile_format: str
    cut_points: tuple[float, ...]
    """[k - 1] the highest reward of each quantile but the last, increasing."""
    mean_rewards: tuple[float, ...]
    """[k] mean training reward of each quantile."""
    target_quantile: int
    kind: str = "quantile"

    key: ClassVar[str] = "method.quantile_format"
    advice: ClassVar[str] = (
        "write all numbers with equally many digits, as {quantile:02d}, lower method.quantiles, choose another "
        "format, or a tokenizer that splits digits"
    )

    @property
    def target(self) -> float:
        """The number of the target quantile."""
        return self.target_quantile

    @property
    def format(self) -> str:
        """The format of a number."""
        return self.quantile_format

    @property
    def quantiles(self) -> int:
        """The number of quantiles."""
        return len(self.mean_rewards)

    def number_of(self, reward: float) -> int:
        """Return the number of the quantile of a reward; one equal to a cut point is below it."""
        return 1 + bisect_left(self.cut_points, reward)

    def text_of(self, number: float) -> str:
        """Return the text of the quantile with this number."""
        return self.quantile_format.format(quantile=int(number))

    def asking(self, target: float) -> "QuantileCondition":
        """Return the condition with another target, the number of a quantile."""
        if target not in range(1, self.quantiles + 1):
            raise ConfigError(
                f"method.target_reward={target:g}: the policy was trained with {self.quantiles} quantiles of the "
                f"reward; give the number of one, from 1 (lowest rewards) to {self.quantiles} (highest)"
            )
        return replace(self, target_quantile=int(target))

    def reward_of(self, target: float) -> float:
        """Return the mean training reward of the quantile with this number."""
        return self.mean_rewards[int(target) - 1]

    @property
    def meaning(self) -> str:
        """What the model card says."""
        return (
            f"The response is conditioned on the quantile of its reward: the prompt ends with `{self.text}`. Write "
            f"another number there, from 1 (lowest rewards) to {self.quantiles} (highest), to ask for another quantile."
        )

    @classmethod
    def _read(cls, values: Any) -> "QuantileCondition":
        cuts, means = (tuple(map(float, values[name])) for name in ("cut_points", "mean_rewards"))
        condition = cls(str(values["quantile_format"]), cuts, means, values["target_quantile"])
        check_quantile_format(condition.quantile_format)
        ordered = all(low < high for low, high in pairwise(cuts))
        if len(means) != len(cuts) + 1 or not ordered or not all(map(math.isfinite, [*cuts, *means])):
            raise ValueError("its cut points do not separate its quantiles")
        return condition.asking(condition.target_quantile)


_KINDS: dict[str, type[Condition]] = {
    "value": ValueCondition,
    "at_least": AtLeastCondition,
    "quantile": QuantileCondition,
}


def condition_text(reward: float, reward_format: str, reward_limit: float) -> str:
    """Return the condition for a normalised reward, clipped to plus or minus the limit.

    Small negative rewards are written as zero: `0.0`, never `-0.0`.
    """
    text = reward_format.format(reward=min(max(reward, -reward_limit), reward_limit))
    return reward_format.format(reward=0.0) if text == reward_format.format(reward=-0.0) else text


def check_format(reward_format: str, reward_limit: float) -> None:
    """Raise ConfigError unless the format distinguishes rewards and the limit is positive."""
    problems = []
    if not 0 < reward_limit < math.inf:
        problems.append(f"method.reward_limit={reward_limit}: needs a positive number, such as 9.9")
    if (problem := _format_problem(reward_format, "reward", (-1.0, 0.0, 1.0))) is not None:
        problems.append(
            f"method.reward_format={reward_format!r}: {problem}; write a marker and the field, "
            "such as <rm_score>{reward:.1f}"
        )
    if problems:
        raise ConfigError(problems)


def check_quantile_format(quantile_format: str) -> None:
    """Raise ConfigError unless the format distinguishes the numbers of quantiles."""
    if (problem := _format_problem(quantile_format, "quantile", (1, 2, 3))) is not None:
        raise ConfigError(
            f"method.quantile_format={quantile_format!r}: {problem}; write a marker and the field, "
            "such as <rm_score>{quantile}"
        )


def _format_problem(text: str, name: str, values: tuple[float, float, float]) -> str | None:
    try:
        fields = [(field, spec or "") for _, field, spec, _ in Formatter().parse(text) if field is not None]
        if [field for field, _ in fields] != [name]:
            return f"needs the field {{{name}}} once and no other"
        if re.search(r"\d{3}", fields[0][1]):
            return "writes a number of a hundred digits or more"
        if len({text.format(**{name: value}) for value in values}) < 3:
            first, second, third = (f"{value:g}" for value in values)
            return f"writes the {name}s {first}, {second} and {third} alike"
    except (ValueError, LookupError, AttributeError) as error:
        return f"cannot be filled in ({error})"
    return None
