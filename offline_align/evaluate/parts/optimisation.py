"""Over-optimisation: is a higher reward also better by other measures, or longer answers, or one model's blind spot?

Every gain is against the baseline on the same prompts, so intervals are paired. Gains of reward models are in standard
deviations of the baseline's own scores, which puts two models on one scale.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.results import Compared, choose_baseline
from offline_align.evaluate.sections import Section, Table
from offline_align.evaluate.statistics import Floats, mean_estimates

NOTE = (
    "A policy that has found the blind spot of a reward model gains by it and not by another. Gains are over the "
    "baseline on the same prompts; those of scores in standard deviations of the baseline's scores. At equal length "
    "is what remains of the gain where answers are as long as the baseline's, by a straight line through all methods' "
    "differences of score and length."
)


def optimisation_section(
    compared: Compared, settings: EvaluateSection, seed: int, second: Floats | None, second_name: str | None
) -> Section | None:
    """Return the guard, or None where only one method is compared; `second` [prompts, samples, methods]."""
    comparison = compared.comparison
    if len(comparison.methods) < 2:
        return None
    baseline = choose_baseline(comparison.methods, settings.baseline)
    base = comparison.methods.index(baseline)
    scores = compared.judgement.scores.mean(axis=1)
    columns = [scores, *([second.mean(axis=1)] if second is not None else [])]
    judged = np.isfinite(np.concatenate(columns, axis=1)).all(axis=1)
    if not judged.any():
        return None
    words = answer_words(comparison)[judged]
    gains = standardised_gains(scores[judged], base)
    measures = {
        "gain": gains,
        "words": words - words[:, [base]],
        "at_equal_length": at_equal_length(gains, words, base),
    }
    if second is not None:
        measures["second_gain"] = standardised_gains(columns[1][judged], base)
    estimates = {
        name: mean_estimates(values, settings.bootstrap_samples, settings.confidence, seed)
        for name, values in measures.items()
    }
    others = [k for k in range(len(comparison.methods)) if k != base]
    methods = {comparison.methods[k]: {name: asdict(values[k]) for name, values in estimates.items()} for k in others}
    content = {"baseline": baseline, "second_model": second_name, "methods": methods}
    return Section("optimisation", "Is the gain real?", NOTE, _findings(methods), content, [_table(methods, baseline)])


def answer_words(comparison: Comparison) -> Floats:
    """Return the mean words of the answers to a prompt [prompts, methods]."""
    lengths = [
        [[len(answer.response.split()) for answer in answers] for answers in samples] for samples in comparison.answers
    ]
    result: Floats = np.array(lengths, dtype=np.float64).mean(axis=1)
    return result


def standardised_gains(scores: Floats, base: int) -> Floats:
    """Return scores [P, M] minus the baseline's, in standard deviations of the baseline's; NaN-free.

    Where the baseline's scores are all equal the judge's own unit is kept.
    """
    spread = scores[:, base].std() or 1.0
    result: Floats = (scores - scores[:, [base]]) / spread
    return result


def at_equal_length(gains: Floats, words: Floats, base: int) -> Floats:
    """Return gains [P, M] less what one common slope of gain by difference of words explains."""
    extra = words - words[:, [base]]
    others = [k for k in range(gains.shape[1]) if k != base]
    # The slope within methods: between them length and quality cannot be told apart.
    x = extra[:, others] - extra[:, others].mean(axis=0)
    y = gains[:, others] - gains[:, others].mean(axis=0)
    slope = float((x * y).sum() / (x * x).sum()) if (x * x).sum() > 0 else 0.0
    result: Floats = gains - slope * extra
    return result


def _findings(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, found in methods.items():
        if found["gain"]["low"] <= 0:
            continue
        if found["at_equal_length"]["low"] <= 0:
            lines.append(f"{name} gains, but not surely at equal length.")
        second = found.get("second_gain")
        if second is not None and second["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not surely by the second reward model.")
        elif second is not None and second["high"] < found["gain"]["low"]:
            lines.append(
                f"{name} gains less by the second reward model: {_interval(second)} against {_interval(found['gain'])}."
            )
    return lines or ["No gain rests on length alone or on one reward model alone, as far as is measured here."]


def _table(methods: Mapping[str, Mapping[str, Any]], baseline: str) -> Table:
    names = {"gain": "gain", "at_equal_length": "at equal length", "second_gain": "second model", "words": "words"}
    first = next(iter(methods.values()))
    used = [key for key in names if key in first]
    rows = [[method, *(_interval(found[key]) for key in used)] for method, found in methods.items()]
    return Table(f"Gain over {baseline}", ["method", *(names[key] for key in used)], rows)


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
