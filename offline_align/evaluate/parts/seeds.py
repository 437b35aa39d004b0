"""Does a result hold over seeds? Means and intervals over repeated trainings.

Intervals over prompts show the uncertainty of one policy's score. Intervals over seeds show that of
the method.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.comparison import Column, Comparison
from offline_align.evaluate.figures import draw_estimates
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "Policies whose settings differ only in run.seed count as one method. The interval is Student's t interval over "
    "the means of the seeds, so it is wide for few seeds. The difference to the baseline is paired by seed if both "
    "have the same seeds."
)


def seeds_section(compared: Compared, settings: EvaluateSection) -> Section | None:
    """Return means over seeds, or None if no method was trained with several seeds."""
    pools = find_pools(compared.comparison)
    if not any(len(columns) > 1 for columns in pools.values()):
        return None
    scores = compared.judgement.scores.mean(axis=1)
    means = scores[np.isfinite(scores).all(axis=1)].mean(axis=0)
    columns = compared.comparison.columns
    baseline = next((name for name in pools if name == (settings.baseline or "sft")), next(iter(pools)))
    base = _by_seed(columns, pools[baseline], means)
    methods: dict[str, dict[str, Any]] = {}
    for name, members in pools.items():
        own = _by_seed(columns, members, means)
        methods[name] = {
            "seeds": list(own),
            "scores": list(own.values()),
            "score": over_seeds(np.array(list(own.values())), settings.confidence),
            "difference": None if name == baseline else _difference(own, base, settings.confidence),
        }
    content = {"baseline": baseline, "methods": methods}
    estimates = [_drawable(one["score"]) for one in methods.values()]
    picture = draw_estimates("Scores over seeds", list(methods), estimates, methods[baseline]["score"]["mean"])
    drawing = Drawing("Mean score over seeds", f"interval over seeds as a bar; dashed: {baseline}", picture)
    return Section("seeds", "Does it hold over seeds?", NOTE, _findings(content), content, [_table(content)], [drawing])


def find_pools(comparison: Comparison) -> dict[str, list[int]]:
    """Return the columns of every method by its name without seed."""
    pools: dict[str, list[int]] = {}
    for k, column in enumerate(comparison.columns):
        pools.setdefault(column.pool or column.name, []).append(k)
    return pools


def _by_seed(columns: Sequence[Column], members: Sequence[int], means: Floats) -> dict[int | None, float]:
    return {columns[k].seed: float(means[k]) for k in members}


def over_seeds(values: Floats, confidence: float) -> dict[str, float | None]:
    """Return mean, standard deviation (n - 1) and Student's t interval over `values` [seeds].

    With one seed there is no standard deviation and no interval.
    """
    mean = float(values.mean())
    if values.size < 2:
        return {"mean": mean, "std": None, "low": None, "high": None}
    std = float(values.std(ddof=1))
    half = float(student.ppf((1 + confidence) / 2, values.size - 1)) * std / values.size**0.5
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}


def _difference(
    own: Mapping[int | None, float], base: Mapping[int | None, float], confidence: float
) -> dict[str, float | None]:
    """Return own minus baseline: paired if the seeds are equal, else against the mean."""
    centre = sum(base.values()) / len(base)
    paired = own.keys() == base.keys()
    return over_seeds(np.array([own[s] - (base[s] if paired else centre) for s in own]), confidence)


def _drawable(one: Mapping[str, float | None]) -> dict[str, float]:
    mean, low, high = (one[name] for name in ("mean", "low", "high"))
    assert mean is not None
    return {"mean": mean, "low": mean if low is None else low, "high": mean if high is None else high}


def _findings(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in content["methods"].items():
        difference = found["difference"]
        if difference is None or difference["low"] is None:
            continue
        significant = difference["low"] > 0 or difference["high"] < 0
        text = f"{name} against {content['baseline']} over {len(found['seeds'])} seeds: {_interval(difference)}"
        lines.append(text + ("." if significant else "; the choice of seed could explain this difference."))
    return lines


def _table(content: Mapping[str, Any]) -> Table:
    rows = [
        [
            name,
            str(len(found["seeds"])),
            _interval(found["score"]),
            "" if found["score"]["std"] is None else f"{found['score']['std']:.3f}",
            "baseline" if found["difference"] is None else _interval(found["difference"]),
            ", ".join(f"{score:.2f}" for score in found["scores"]),
        ]
        for name, found in content["methods"].items()
    ]
    header = ["method", "seeds", "mean score", "std over seeds", f"minus {content['baseline']}", "each seed"]
    return Table("Over seeds", header, rows)


def _interval(one: Mapping[str, float | None]) -> str:
    if one["low"] is None:
        return f"{one['mean']:.2f}"
    return f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
