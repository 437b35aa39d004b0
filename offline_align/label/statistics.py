"""Mean, spread and quantiles of raw rewards, and their normalisation (the paper's Figure 3).

Every method uses normalised rewards: the mean is subtracted and the result is divided by the
population standard deviation. Both are computed once, over the whole labelled set, or taken from an
earlier set, so that both sets are on one scale.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offline_align.errors import DataError

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
FAR_OUT = 20.0
_SAME = 1e-3
"""Standard deviations by which equal normalised rewards may differ, for example if a file rounds them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scale:
    """What raw rewards are normalised with: `reward = (raw - mean) / std`."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class RewardStats:
    """Statistics of the raw rewards of a labelled set, in the reward model's own unit."""

    mean: float
    std: float
    """Population standard deviation (divides by `count`)."""
    count: int
    quantiles: dict[str, float]
    """Level, as `0.05`, to reward; levels between two rows are interpolated."""
    normalised_with: Scale | None = None
    """The scale of an earlier labelled set, if this set was normalised with it."""

    @property
    def scale(self) -> Scale:
        """The scale of the normalised rewards: that of an earlier set, or else the set's own."""
        return self.normalised_with or Scale(self.mean, self.std)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `reward_stats.json`; `normalised_with` only if it is an earlier set's."""
        found = asdict(self)
        return found if self.normalised_with else {k: v for k, v in found.items() if k != "normalised_with"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RewardStats":
        """Return the statistics that `as_json` wrote; KeyError names a missing field."""
        quantiles = {level: float(value) for level, value in content["quantiles"].items()}
        given = content.get("normalised_with")
        scale = Scale(float(given["mean"]), float(given["std"])) if given is not None else None
        return cls(float(content["mean"]), float(content["std"]), int(content["count"]), quantiles, scale)


def fit(raw: ArrayLike) -> RewardStats:
    """Return the statistics of raw rewards [rows], computed in float64.

    Finite rewards do not overflow: sums run on values scaled by a power of two, which changes no
    bit of the result. Outliers are kept, as in the paper. One reward of 1e30 among n rows
    normalises to sqrt(n - 1), and all others to about -1/sqrt(n); `normalise` then warns. Raises
    DataError if there are no rows, or naming the first row (from 0) that is not finite.
    """
    rewards = _finite_rewards(raw)
    exponent = int(np.frexp(np.abs(rewards).max())[1])
    scaled = np.ldexp(rewards, -exponent)
    # Rounding would give equal rewards a tiny spread, which normalisation would scale up to 1.
    constant = scaled.min() == scaled.max()
    mean = float(rewards[0] if constant else np.ldexp(scaled.mean(), exponent))
    std = 0.0 if constant else float(np.ldexp(scaled.std(), exponent))
    values = np.ldexp(np.quantile(scaled, LEVELS), exponent)
    quantiles = {f"{level:g}": float(value) for level, value in zip(LEVELS, values, strict=True)}
    return RewardStats(mean, std, rewards.size, quantiles)


def normalise(raw: ArrayLike, stats: RewardStats) -> NDArray[np.float64]:
    """Return `(raw - mean) / std` [rows] on the scale of `stats`; all zeros, with a warning, if `std` is 0.

    Raises DataError if there are no rows, or naming the first row (from 0) that is not finite.
    """
    rewards = _finite_rewards(raw)
    scale = stats.scale
    if scale.std == 0.0:
        log.warning(
            "all %d rewards are %g: every normalised reward is 0, so no method can tell rows apart",
            stats.count,
            stats.mean,
        )
        return np.zeros_like(rewards)
    # Both operands are halved so that the difference of two huge rewards stays finite.
    normalised = (rewards / 2 - scale.mean / 2) / (scale.std / 2)
    _warn_far_out(rewards, normalised)
    return normalised


def scale_of(raw: ArrayLike, normalised: ArrayLike) -> Scale | None:
    """Return the scale with which `raw` rewards [rows] became `normalised` [rows], computed from the two.

    None if there is none: all rewards are equal, or the two are not on one line.
    """
    before, after = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (raw, normalised))
    low, high = int(before.argmin()), int(before.argmax())
    if not after[low] < after[high]:
        return None
    std = (before[high] - before[low]) / (after[high] - after[low])
    mean = before[low] - std * after[low]
    on_line = np.allclose((before - mean) / std, after, rtol=_SAME, atol=_SAME)
    return Scale(float(mean), float(std)) if on_line else None


def same_scale(a: Scale, b: Scale) -> bool:
    """Return whether a reward has nearly the same normalised value on both scales."""
    return abs(a.mean - b.mean) <= _SAME * b.std and abs(a.std / b.std - 1) <= _SAME


def _finite_rewards(raw: ArrayLike) -> NDArray[np.float64]:
    rewards = np.asarray(raw, dtype=np.float64).reshape(-1)
    if rewards.size == 0:
        raise DataError("reward_raw: no rows to compute statistics from; label at least one row")
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        raise DataError(
            f"row {bad[0]}: reward_raw: {rewards[bad[0]]} is not finite ({bad.size} such rows); "
            "check the reward model's training run"
        )
    return rewards


def _warn_far_out(rewards: NDArray[np.float64], normalised: NDArray[np.float64]) -> None:
    row = int(np.abs(normalised).argmax())
    if abs(normalised[row]) > FAR_OUT:
        log.warning(
            "row %d: reward_raw %g is %.0f standard deviations from the mean and compresses all other rewards",
            row,
            rewards[row],
            abs(normalised[row]),
        )


def share_within(normalised: Sequence[float] | NDArray[np.float64], limit: float) -> float:
    """Return the share of normalised rewards in [-limit, limit]; in the paper most lie within 2.5."""
    return float(np.mean(np.abs(np.asarray(normalised, dtype=np.float64)) <= limit))
