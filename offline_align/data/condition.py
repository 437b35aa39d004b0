"""The text that states a reward before a response (Conditional Alignment, Eq. 6)."""

import math
import re
from dataclasses import dataclass
from string import Formatter
from typing import Any

from offline_align.errors import ConfigError


@dataclass(frozen=True)
class Condition:
    """The reward text of Conditional Alignment (Eq. 6) and the reward that generation asks for."""

    reward_format: str
    reward_limit: float
    target_reward: float

    @property
    def text(self) -> str:
        """The text that asks for the target reward."""
        return condition_text(self.target_reward, self.reward_format, self.reward_limit)

    @classmethod
    def from_values(cls, values: Any) -> "Condition | None":
        """Return the condition stored in a file, or None; raises ValueError if it is invalid."""
        if not values:
            return None
        try:
            condition = cls(str(values["reward_format"]), float(values["reward_limit"]), float(values["target_reward"]))
            check_format(condition.reward_format, condition.reward_limit)
        except (TypeError, LookupError, ConfigError) as error:
            raise ValueError(f"the condition {values!r} cannot be used: {error}") from error
        return condition


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
