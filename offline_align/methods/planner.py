"""What FA, RWR and CA would make of a labelled file, and what each would cost: arithmetic only.

Costs are shares of the tokens of plain SFT over the same rows, which is what an epoch's time follows.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offline_align.data.condition import condition_text
from offline_align.data.records import LabelledSample, Message
from offline_align.methods import ca, checked, fa, rwr

BETAS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Temperatures that are shown beside the one asked for (paper: 5)."""

TOP_SHARE = 0.01
"""Share of the heaviest rows whose part of the weight is reported."""


@dataclass(frozen=True)
class FilteringPlan:
    """What FA keeps."""

    threshold: float
    rows: int
    rows_share: float
    size: int
    """Tokens (or characters) of the rows that are kept."""
    repeated: int
    """Of those, in prompts that an earlier row has too: not computed with `data.group_by_prompt`."""
    cost: float


@dataclass(frozen=True)
class WeightedPlan:
    """How RWR weighs; weights have mean 1."""

    beta: float
    min_weight: float
    max_weight: float
    effective_sample_size: float
    effective_share: float
    """Effective sample size as a share of the rows."""
    top_mass: float
    """Part of the weight that is on the heaviest 1 % of the rows (1 row at least)."""
    cost: float


@dataclass(frozen=True)
class ConditionalPlan:
    """What CA writes."""

    min_reward: float
    max_reward: float
    clipped_rows: int
    """Rows beyond `method.reward_limit`."""
    conditions: dict[str, int]
    """Rows of every condition text, by increasing reward."""
    target_condition: str
    """The text that generation would ask with."""
    target_percentile: float
    """Percent of the rows with a reward up to the target."""
    target_in_range: bool
    """Whether a row has a reward as high and one as low as the target."""
    target_rows: int
    """Rows with exactly the target's condition."""
    extra_size: int
    """Tokens (or characters) that all conditions add together."""
    cost: float


@dataclass(frozen=True)
class Plan:
    """All three methods over one labelled file."""

    rows: int
    unit: str
    """`tokens` or `characters`."""
    size: int
    """Of all rows, prompts and responses: what an epoch of SFT reads."""
    response_size: int
    """Of all responses: what the loss is on."""
    repeated: int
    """Of prompts that an earlier row has too: not computed with `data.group_by_prompt`."""
    filtering: FilteringPlan
    weighted: WeightedPlan
    conditional: ConditionalPlan
    betas: tuple[WeightedPlan, ...]
    """RWR at other temperatures, and at the one asked for."""


@dataclass(frozen=True)
class Settings:
    """The settings of all methods, by the names of their keys."""

    threshold: float
    beta: float
    target_reward: float
    reward_format: str
    reward_limit: float
    best_of: int | None = None


@dataclass(frozen=True)
class Sizes:
    """How long rows are, in one unit."""

    unit: str
    rows: Sequence[int]
    """Prompt and response of each row."""
    responses: Sequence[int]
    condition: Callable[[str], int]
    """Size of a condition text."""


def plan(rows: Iterable[LabelledSample], sizes: Sizes, settings: Settings) -> Plan:
    """Return what each method would do with the rows.

    Raises ConfigError for settings that no method could run with, DataError for unusable rewards.
    """
    labelled = checked(rows)
    rewards = [row.reward for row in labelled]
    betas = tuple(weighted(rewards, beta) for beta in sorted({*BETAS, settings.beta}))
    return Plan(
        rows=len(labelled),
        unit=sizes.unit,
        size=sum(sizes.rows),
        response_size=sum(sizes.responses),
        repeated=repeated(labelled, _prompt_sizes(labelled, sizes)),
        filtering=filtering(labelled, sizes, settings.threshold, settings.best_of),
        weighted=weighted(rewards, settings.beta),
        conditional=conditional(labelled, sizes, settings),
        betas=betas,
    )


def repeated(rows: Iterable[LabelledSample], prompt_sizes: Mapping[str, int]) -> int:
    """Return how much of the rows is prompts that an earlier one of them has too; sizes are by id."""
    met: set[tuple[Message, ...]] = set()
    total = 0
    for row in rows:
        total += prompt_sizes[row.id] if row.prompt in met else 0
        met.add(row.prompt)
    return total


def _prompt_sizes(rows: Sequence[LabelledSample], sizes: Sizes) -> dict[str, int]:
    both = zip(rows, sizes.rows, sizes.responses, strict=True)
    return {row.id: size - response for row, size, response in both}


def filtering(
    rows: Sequence[LabelledSample], sizes: Sizes, threshold: float, best_of: int | None = None
) -> FilteringPlan:
    """Return what FA keeps (Eq. 4), which may be nothing."""
    by_id = {row.id: size for row, size in zip(rows, sizes.rows, strict=True)}
    kept = fa.above(rows, threshold, best_of)
    size, again = sum(by_id[row.id] for row in kept), repeated(kept, _prompt_sizes(rows, sizes))
    return FilteringPlan(threshold, len(kept), len(kept) / len(rows), size, again, size / sum(sizes.rows))


def weighted(rewards: Sequence[float], beta: float) -> WeightedPlan:
    """Return how RWR weighs (Eq. 5) at one temperature."""
    weights = sorted(rwr.scaled_weights(rewards, beta), reverse=True)
    effective = rwr.effective_sample_size(weights)
    heaviest = weights[: max(1, math.floor(TOP_SHARE * len(weights)))]
    return WeightedPlan(
        beta=beta,
        min_weight=weights[-1],
        max_weight=weights[0],
        effective_sample_size=effective,
        effective_share=effective / len(weights),
        top_mass=math.fsum(heaviest) / math.fsum(weights),
        cost=1.0,
    )


def conditional(rows: Sequence[LabelledSample], sizes: Sizes, settings: Settings) -> ConditionalPlan:
    """Return what CA writes (Eq. 6) and where the target lies among it."""
    by_reward = sorted(rows, key=lambda row: row.reward)
    made = ca.condition(by_reward, settings.reward_format, settings.reward_limit)
    conditions = Counter(row.condition for row in made)
    extra = sum(sizes.condition(text) * count for text, count in conditions.items())
    rewards = [row.reward for row in by_reward]
    target = settings.target_reward
    target_text = condition_text(target, settings.reward_format, settings.reward_limit)
    return ConditionalPlan(
        min_reward=rewards[0],
        max_reward=rewards[-1],
        clipped_rows=sum(abs(reward) > settings.reward_limit for reward in rewards),
        conditions=dict(conditions),
        target_condition=target_text,
        target_percentile=100 * bisect_right(rewards, target) / len(rewards),
        target_in_range=rewards[0] <= target <= rewards[-1],
        target_rows=conditions[target_text],
        extra_size=extra,
        cost=1 + extra / sum(sizes.rows),
    )
