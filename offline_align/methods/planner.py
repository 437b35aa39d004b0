"""Compute what each method would do with a labelled file and what it would cost.

A cost is a number of tokens, relative to plain SFT over the same rows. The time of an epoch is
about proportional to it.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from offline_align.config.runs import PlanMethodSection
from offline_align.config.sections import ConditionalMethodSection, ConditionKind, PairsOf
from offline_align.data.condition import QuantileCondition
from offline_align.data.records import LabelledSample, Message
from offline_align.methods import ca, checked, dpo, fa, rwr

BETAS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Temperatures to show in addition to the chosen one (paper: 5)."""

FORWARD_SHARE = 1 / 3
"""Cost of a forward pass, as a fraction of the cost of a training step."""

TOP_SHARE = 0.01
"""Fraction of the rows, by largest weight, whose share of the total weight is `top_mass`."""


@dataclass(frozen=True)
class FilteringPlan:
    """Rows that FA keeps."""

    threshold: float
    rows: int
    rows_share: float
    size: int
    """Tokens (or characters) of the kept rows."""
    repeated: int
    """Part of `size` that is in prompts of earlier rows. `data.group_by_prompt` does not compute it
    again."""
    cost: float


@dataclass(frozen=True)
class WeightedPlan:
    """Weights of RWR, which have mean 1."""

    beta: float
    min_weight: float
    max_weight: float
    effective_sample_size: float
    effective_share: float
    """Effective sample size as a fraction of the rows."""
    top_mass: float
    """Share of the total weight that the 1 % of rows (at least 1) with the largest weights have."""
    cost: float


@dataclass(frozen=True)
class ConditionalPlan:
    """Condition texts of CA, and where the target lies among the rewards."""

    kind: ConditionKind
    min_reward: float
    max_reward: float
    min_number: float
    max_number: float
    """The least and the greatest number that a row states: a reward, a bound or a quantile."""
    clipped_rows: int
    """Number of rows whose reward is beyond plus or minus `method.reward_limit`; 0 for quantiles."""
    rows: int
    """Training rows; a row counts once for each of its bounds."""
    cut_points: tuple[float, ...]
    """The highest reward of each quantile but the last; empty unless conditions are quantiles."""
    conditions: dict[str, int]
    """Number of rows per condition text, in order of increasing reward."""
    target_condition: str
    """Condition text that generation would use."""
    target_percentile: float
    """Percentage of the rows whose reward is at most the target, or in its quantile or a lower one."""
    target_in_range: bool
    """Whether the target lies between the lowest and the highest number that a row states."""
    target_rows: int
    """Number of rows with exactly the target's condition text."""
    extra_size: int
    """Tokens (or characters) that all condition texts add, and the copies of rows with several bounds."""
    repeated: int
    """Size of prompts of earlier rows or copies. `data.group_by_prompt` does not compute them again."""
    cost: float
    weights: WeightedPlan | None
    """Weights of the rows, with `method.weight_by_reward`."""


@dataclass(frozen=True)
class PreferencePlan:
    """Pairs that DPO would make of the answers to one prompt."""

    pairs: int
    prompts: int
    """Prompts that have a pair."""
    single_answers: int
    """Prompts with only one answer, which can have none."""
    min_gap: float
    mean_gap: float
    max_gap: float
    """Smallest, mean and largest difference of the normalised rewards in a pair; 0 without pairs."""
    mean_chosen: float
    mean_rejected: float
    """Mean size of the chosen and of the rejected responses; 0 without pairs. If they differ much, DPO
    may learn the length instead of the quality."""
    size: int
    """Tokens (or characters) of all pairs, with the prompt of a pair counted once."""
    cost: float
    """Cost of an epoch, and of the forward pass over all pairs before it."""


@dataclass(frozen=True)
class Plan:
    """What the methods would do with one labelled file."""

    rows: int
    unit: str
    """`tokens` or `characters`."""
    size: int
    """Size of all rows (prompts and responses), which an epoch of SFT processes."""
    response_size: int
    """Size of all responses, on which the loss is computed."""
    repeated: int
    """Size of prompts of earlier rows. `data.group_by_prompt` does not compute them again."""
    filtering: FilteringPlan
    weighted: WeightedPlan
    conditional: ConditionalPlan
    preference: PreferencePlan
    betas: tuple[WeightedPlan, ...]
    """RWR at several temperatures, among them the chosen one."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the rows, all in `unit`."""

    unit: str
    rows: Sequence[int]
    """Size of prompt and response of each row."""
    responses: Sequence[int]
    """Size of the response of each row."""
    condition: Callable[[str], int]
    """Returns the size of a condition text."""


def plan(rows: Iterable[LabelledSample], sizes: Sizes, settings: PlanMethodSection, seed: int) -> Plan:
    """Return what each method would do with the rows; `seed` is `run.seed`.

    Raises ConfigError for settings that no method accepts, and DataError for unusable rewards.
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
        conditional=conditional(labelled, sizes, settings, seed),
        preference=preference(labelled, sizes, settings.pairs, settings.min_gap),
        betas=betas,
    )


def repeated(rows: Iterable[LabelledSample], prompt_sizes: Mapping[str, int]) -> int:
    """Return the total size of prompts that an earlier row has too; `prompt_sizes` is by row id."""
    seen: set[tuple[Message, ...]] = set()
    total = 0
    for row in rows:
        total += prompt_sizes[row.id] if row.prompt in seen else 0
        seen.add(row.prompt)
    return total


def _prompt_sizes(rows: Sequence[LabelledSample], sizes: Sizes) -> dict[str, int]:
    both = zip(rows, sizes.rows, sizes.responses, strict=True)
    return {row.id: size - response for row, size, response in both}


def filtering(
    rows: Sequence[LabelledSample], sizes: Sizes, threshold: float, best_of: int | None = None
) -> FilteringPlan:
    """Return the rows that FA keeps (Eq. 4), possibly none, as sizes and shares."""
    by_id = {row.id: size for row, size in zip(rows, sizes.rows, strict=True)}
    kept = fa.above(rows, threshold, best_of)
    size, again = sum(by_id[row.id] for row in kept), repeated(kept, _prompt_sizes(rows, sizes))
    return FilteringPlan(threshold, len(kept), len(kept) / len(rows), size, again, size / sum(sizes.rows))


def weighted(rewards: Sequence[float], beta: float) -> WeightedPlan:
    """Return the weights of RWR (Eq. 5) at one temperature, summarised."""
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


def conditional(
    rows: Sequence[LabelledSample], sizes: Sizes, settings: ConditionalMethodSection, seed: int
) -> ConditionalPlan:
    """Return the condition texts of CA (Eq. 6) and where the target lies among the rewards."""
    fitted = ca.fit(rows, settings, seed)
    condition, limit = fitted.condition, settings.reward_limit
    rewards = [row.reward for row in rows]
    numbers = sorted(number for row in rows for number in fitted.numbers(row))
    conditions = Counter(map(condition.text_of, numbers))
    copies = len(numbers) // len(rows)
    texts = sum(sizes.condition(text) * count for text, count in conditions.items())
    extra = texts + (copies - 1) * sum(sizes.rows)
    prompts = _prompt_sizes(rows, sizes)
    is_quantile = isinstance(condition, QuantileCondition)
    known = numbers if is_quantile else sorted(rewards)
    return ConditionalPlan(
        kind=settings.condition,
        min_reward=min(rewards),
        max_reward=max(rewards),
        min_number=numbers[0],
        max_number=numbers[-1],
        clipped_rows=0 if is_quantile else sum(abs(reward) > limit for reward in rewards),
        rows=len(numbers),
        cut_points=condition.cut_points if isinstance(condition, QuantileCondition) else (),
        conditions=dict(conditions),
        target_condition=condition.text,
        target_percentile=100 * bisect_right(known, condition.target) / len(known),
        target_in_range=numbers[0] <= condition.target <= numbers[-1],
        target_rows=conditions[condition.text],
        extra_size=extra,
        repeated=(copies - 1) * sum(prompts.values()) + repeated(rows, prompts),
        cost=1 + extra / sum(sizes.rows),
        weights=weighted(rewards, settings.beta) if settings.weight_by_reward else None,
    )


def preference(rows: Sequence[LabelledSample], sizes: Sizes, which: PairsOf, min_gap: float) -> PreferencePlan:
    """Return the pairs that DPO makes of the rows, possibly none, summarised."""
    made = dpo.pairs(rows, which, min_gap)
    response = {row.id: size for row, size in zip(rows, sizes.responses, strict=True)}
    prompt = _prompt_sizes(rows, sizes)
    chosen, rejected = ([response[pair.made_of[k]] for pair in made] for k in (0, 1))
    size = sum(prompt[pair.made_of[0]] for pair in made) + sum(chosen) + sum(rejected)
    gaps = [pair.margin for pair in made if pair.margin is not None] or [0.0]
    answers = Counter(row.prompt for row in rows)
    return PreferencePlan(
        pairs=len(made),
        prompts=len({pair.prompt for pair in made}),
        single_answers=sum(count == 1 for count in answers.values()),
        min_gap=min(gaps),
        mean_gap=math.fsum(gaps) / len(gaps),
        max_gap=max(gaps),
        mean_chosen=sum(chosen) / max(1, len(made)),
        mean_rejected=sum(rejected) / max(1, len(made)),
        size=size,
        cost=(1 + FORWARD_SHARE) * size / sum(sizes.rows),
    )
