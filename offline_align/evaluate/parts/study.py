"""Which method should you take? Scores by every judge over seeds, and hours (the paper's Section 5).

Shapes: P prompts, S seeds of a method, B draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.comparison import Comparison, competing
from offline_align.evaluate.figures import draw_judges
from offline_align.evaluate.parts.cost import total_hours
from offline_align.evaluate.results import Compared, group_of
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats, rank_scores
from offline_align.evaluate.tables import interval

NOTE = (
    "Policies whose settings differ only in run.seed count as one method. Of a policy with several targets only the "
    "highest one competes. The intervals hold the uncertainty over prompts (paired bootstrap) and over seeds "
    "(Student's t); with one seed they hold that over prompts alone. The chance to be best is the share of the same "
    "draws in which a method has the highest mean. Rank scores compare policies of the same seed. Hours are those of "
    "all runs behind a method's answers, from data preparation to generation, times ranks, as if it were the only "
    "method."
)
TRUTH = "true quality"
SURE = 0.95
"""Chance to be best from which the report recommends a method without reservation."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judge's scores of all answers: means over the samples of each prompt, NaN if missing."""

    judge: str
    scores: Floats
    """[P, columns of the comparison]."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Means of every method and draws from their uncertainty."""

    means: Floats
    """[methods]."""
    draws: Floats
    """[B, methods]."""

    def estimates(self, confidence: float) -> list[dict[str, float]]:
        low, high = np.quantile(self.draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        return [
            {"mean": float(mean), "low": float(a), "high": float(b)}
            for mean, a, b in zip(self.means, low, high, strict=True)
        ]

    def difference(self, best: int, other: int, confidence: float) -> dict[str, float]:
        one = _Drawn(self.means[[best]] - self.means[[other]], (self.draws[:, best] - self.draws[:, other])[:, None])
        return one.estimates(confidence)[0]

    def chances(self) -> Floats:
        """Return [methods], the share of draws in which each is the best; ties are shared."""
        top = self.draws == self.draws.max(axis=1, keepdims=True)
        result: Floats = (top / top.sum(axis=1, keepdims=True)).mean(axis=0)
        return result


def study_section(
    compared: Compared, settings: EvaluateSection, seed: int, others: Sequence[Verdict] = ()
) -> Section | None:
    """Return the comparison of all methods by all judges, or None if fewer than two methods compete.

    `others` are the verdicts of other judges on the same answers. The first judge decides: true
    quality if it is known, else the judge of this run.
    """
    comparison = compared.comparison
    pools = competing_pools(comparison)
    if len(pools) < 2:
        return None
    verdicts = _verdicts(compared, others)
    labels = [group_of(prompt.columns, settings.group_by) for prompt in comparison.prompts]
    judges = {one.judge: _judged(one, labels, pools, comparison, settings, seed) for one in verdicts}
    content = {
        "methods": {name: _seeds(comparison, columns) for name, columns in pools.items()},
        "decided_by": verdicts[0].judge,
        "judges": judges,
        "hours": _hours(comparison, pools),
    }
    figure = {name: [found["methods"][m]["rank_score"] for m in pools] for name, found in judges.items()}
    drawing = Drawing(
        "Rank score by judge",
        "bars are intervals; higher is better (the paper's Figure 4)",
        draw_judges("Rank score by judge", list(pools), figure),
    )
    findings = list(_findings(content))
    return Section("study", "Which method should you take?", NOTE, findings, content, list(_tables(content)), [drawing])


def competing_pools(comparison: Comparison) -> dict[str, list[int]]:
    """Return the columns of every competing method, in the order of their seeds, by its name."""
    columns = comparison.columns
    pools: dict[str, list[int]] = {}
    for k in competing(columns):
        pools.setdefault(columns[k].pool or columns[k].name, []).append(k)
    return {name: sorted(found, key=lambda k: columns[k].seed or 0) for name, found in pools.items()}


def _verdicts(compared: Compared, others: Sequence[Verdict]) -> list[Verdict]:
    own = Verdict(compared.judgement.name, compared.judgement.scores.mean(axis=1))
    truth = [] if compared.quality is None else [Verdict(TRUTH, compared.quality.mean(axis=1))]
    # On the demo corpus this run has true quality beside its scores; another run may have judged by it.
    return [*truth, own, *(one for one in others if not (truth and one.judge == TRUTH))]


def _judged(
    verdict: Verdict,
    labels: Sequence[str | None],
    pools: Mapping[str, Sequence[int]],
    comparison: Comparison,
    settings: EvaluateSection,
    seed: int,
) -> dict[str, Any]:
    """Return one judge's estimates of every method, overall and by group."""
    used = [k for columns in pools.values() for k in columns]
    judged = np.isfinite(verdict.scores[:, used]).all(axis=1)
    members = [verdict.scores[judged][:, columns].T for columns in pools.values()]
    drawn = draw(members, settings.bootstrap_samples, seed)
    ranks = draw(_ranks(verdict.scores[judged], pools, comparison), settings.bootstrap_samples, seed)
    confidence = settings.confidence
    groups = {}
    for label in dict.fromkeys(one for one in labels if one is not None):
        chosen = np.array([one == label for one in labels])[judged]
        if chosen.any():
            part = draw([scores[:, chosen] for scores in members], settings.bootstrap_samples, seed)
            groups[label] = dict(zip(pools, part.estimates(confidence), strict=True))
    chances = drawn.chances()
    order = np.argsort(-drawn.means, kind="stable")
    names = list(pools)
    return {
        "prompts": int(judged.sum()),
        "methods": {
            name: {"score": score, "rank_score": rank, "chance_best": float(chance)}
            for name, score, rank, chance in zip(
                names, drawn.estimates(confidence), ranks.estimates(confidence), chances, strict=True
            )
        },
        "groups": groups,
        "best": names[order[0]],
        "second": names[order[1]],
        "lead": drawn.difference(int(order[0]), int(order[1]), confidence),
    }


def draw(members: Sequence[Floats], draws: int, seed: int) -> _Drawn:
    """Return mean and draws of each method from its scores [S, P].

    A draw resamples the prompts, the same for all methods, and moves each mean by Student's t with
    S - 1 degrees of freedom, times the standard error over seeds. Methods share prompts, but not the
    randomness of their seeds.
    """
    rng = np.random.default_rng(seed)
    prompts = members[0].shape[1]
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts
    over_prompts = counts @ np.stack([scores.mean(axis=0) for scores in members], axis=1)
    for k, scores in enumerate(members):
        seeds = len(scores)
        if seeds > 1:
            error = scores.mean(axis=1).std(ddof=1) / seeds**0.5
            over_prompts[:, k] += error * rng.standard_t(seeds - 1, size=draws)
    return _Drawn(np.array([scores.mean() for scores in members]), over_prompts)


def _ranks(scores: Floats, pools: Mapping[str, Sequence[int]], comparison: Comparison) -> list[Floats]:
    """Return the rank scores of each method [seeds, P].

    Policies of the same seed are ranked against each other; a method without this seed takes part
    with its first policy.
    """
    columns = comparison.columns
    repeated = [members for members in pools.values() if len(members) > 1]
    seeds = sorted({columns[k].seed for members in repeated for k in members}, key=lambda seed: seed or 0)
    sets = [
        [next((k for k in members if columns[k].seed == seed), members[0]) for members in pools.values()]
        for seed in seeds or [None]
    ]
    ranked = np.stack([rank_scores(scores[:, chosen]) for chosen in sets])
    found = []
    for m, members in enumerate(pools.values()):
        values = ranked[:, :, m]
        # The ranks of a single policy against several seeds are no repeated trainings of it.
        found.append(values if len(members) > 1 else values.mean(axis=0, keepdims=True))
    return found


def _seeds(comparison: Comparison, columns: Sequence[int]) -> list[int]:
    return [seed for k in columns if (seed := comparison.columns[k].seed) is not None]


def _hours(comparison: Comparison, pools: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return mean hours of each method over its seeds and their ratio to the dearest method."""
    hours = total_hours(comparison)
    found: dict[str, float | None] = {}
    for name, columns in pools.items():
        known = [value for k in columns if (value := hours[k]) is not None]
        found[name] = float(np.mean(known)) if len(known) == len(columns) else None
    dearest = max((value for value in found.values() if value is not None), default=None)
    return {
        name: {"hours": value, "of_dearest": value / dearest if value is not None and dearest else None}
        for name, value in found.items()
    }


def _findings(content: Mapping[str, Any]) -> Iterator[str]:
    judge = content["decided_by"]
    found, hours = content["judges"][judge], content["hours"]
    best, second = found["best"], found["second"]
    chance = found["methods"][best]["chance_best"]
    lead = interval(found["lead"])
    by = f"By {'true quality' if judge == TRUTH else judge}"
    if chance >= SURE:
        yield f"{by}, take {best}: it is the best method with {_chance(chance)}, {lead} above {second}."
    else:
        yield (
            f"{by}, {best} comes first, but only with {_chance(chance)}: it is {lead} above {second}. "
            "More prompts or seeds would decide."
        )
    costs = [(name, hours[name]["hours"]) for name in (best, second)]
    if all(value for _, value in costs):
        ratio = costs[1][1] / costs[0][1]
        yield f"{second} takes {ratio:.2f} times as many hours as {best}."
    for name, other in content["judges"].items():
        if name != judge:
            own = other["methods"][other["best"]]["chance_best"]
            agrees = "agrees" if other["best"] == best else f"puts {other['best']} first"
            yield f"{name} {agrees} ({_chance(own)})."
    single = [name for name, seeds in content["methods"].items() if len(seeds) < 2]
    if len(single) == len(content["methods"]):
        yield "Every method was trained with one seed, so another seed may change the order."


def _chance(share: float) -> str:
    return "a chance above 99 %" if share > 0.99 else f"a chance of {100 * share:.0f} %"


def _tables(content: Mapping[str, Any]) -> Iterator[Table]:
    judges = content["judges"]
    header = ["method", "seeds"]
    for judge, found in judges.items():
        header += [f"{group}, {judge}" for group in found["groups"]] if len(found["groups"]) > 1 else []
        header += [f"mean, {judge}" if len(found["groups"]) > 1 else judge, "chance to be best"]
    rows = []
    for name, seeds in content["methods"].items():
        row = [name, str(max(1, len(seeds)))]
        for found in judges.values():
            one = found["methods"][name]
            row += [interval(group[name]) for group in found["groups"].values()] if len(found["groups"]) > 1 else []
            row += [interval(one["score"]), f"{one['chance_best']:.0%}"]
        rows.append(row)
    yield Table("Scores by judge", header, rows)
    names = [*judges]
    yield Table(
        "Rank score by judge",
        ["method", *names],
        [[m, *(interval(judges[j]["methods"][m]["rank_score"]) for j in names)] for m in content["methods"]],
    )
    hours = content["hours"]
    if any(one["hours"] is not None for one in hours.values()):
        yield Table(
            "Hours",
            ["method", "hours times ranks", "of the dearest"],
            [
                [m, "unknown", ""] if one["hours"] is None else [m, f"{one['hours']:.3g}", f"{one['of_dearest']:.0%}"]
                for m, one in hours.items()
            ],
        )
