"""Over-optimisation: is a higher reward also better by other measures, or longer answers, or one model's blind spot?

And what did it cost in distance from the baseline's policy?

Every gain is against the baseline on the same prompts, so intervals are paired. Gains of reward models are in standard
deviations of the baseline's own scores, which puts two models on one scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.figures import draw_gains
from offline_align.evaluate.resampling import mean_estimates
from offline_align.evaluate.results import Compared, choose_baseline
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "A policy that has found the blind spot of a reward model gains by it and not by another. Gains are over the "
    "baseline on the same prompts; those of scores in standard deviations of the baseline's scores. At equal length "
    "is what remains of the gain where answers are as long as the baseline's, by a straight line through all methods' "
    "differences of score and length."
)
TRUTH_NOTE = (
    " True quality is that of the demo corpus, in its own points from 0 to 10: a gain of score without a gain of it is "
    "the reward model's mistake."
)
DIVERGENCE_NOTE = (
    " KL is the mean log-likelihood of a method's own answers under its policy less that under the baseline's, in nats "
    "an answer and a token."
)


def optimisation_section(
    compared: Compared,
    settings: EvaluateSection,
    seed: int,
    second: Floats | None,
    second_name: str | None,
    divergence: Divergence | None = None,
) -> Section | None:
    """Return the guard, or None where only one method is compared; `second` [prompts, samples, methods]."""
    comparison = compared.comparison
    if len(comparison.methods) < 2:
        return None
    baseline = choose_baseline(comparison.columns, settings.baseline)
    base = comparison.methods.index(baseline)
    scores = compared.judgement.scores.mean(axis=1)
    columns = [scores, *([second.mean(axis=1)] if second is not None else [])]
    judged = np.isfinite(np.concatenate(columns, axis=1)).all(axis=1)
    if not judged.any():
        return None
    words = answer_words(comparison)[judged]
    gains = standardised_gains(scores[judged], base)
    measures = {"gain": gains, "words": words - words[:, [base]]}
    equal = at_equal_length(gains, words, base)
    if equal is not None:
        measures["at_equal_length"] = equal
    if second is not None:
        measures["second_gain"] = standardised_gains(columns[1][judged], base)
    truth = None if compared.quality is None else compared.quality.mean(axis=1)[judged]
    if truth is not None:
        measures["true_gain"] = truth - truth[:, [base]]
    estimates = {
        name: mean_estimates(values, settings.bootstrap_samples, settings.confidence, seed)
        for name, values in measures.items()
    }
    reversed_pairs = [] if truth is None else reversals(scores[judged], truth, comparison.methods, settings, seed)
    others = [k for k in range(len(comparison.methods)) if k != base]
    methods: dict[str, dict[str, Any]] = {
        comparison.methods[k]: {"at_equal_length": None} | {name: asdict(v[k]) for name, v in estimates.items()}
        for k in others
    }
    if divergence is not None:
        for k in others:
            methods[comparison.methods[k]] |= _divergence(divergence, k, judged, settings, seed)
    return Section(
        name="optimisation",
        title="Is the gain real?",
        note=NOTE + TRUTH_NOTE * (truth is not None) + DIVERGENCE_NOTE * (divergence is not None),
        findings=_findings(methods, reversed_pairs) + _distances(methods, baseline),
        content={"baseline": baseline, "second_model": second_name, "methods": methods},
        tables=[_table(methods, baseline)],
        drawings=_drawings(methods, comparison.methods),
    )


def _divergence(
    divergence: Divergence, method: int, judged: NDArray[np.bool_], settings: EvaluateSection, seed: int
) -> dict[str, Any]:
    """Return KL in nats an answer with its interval, and a token; nothing where no answer's is known."""
    nats, tokens = divergence.nats[judged, :, method], divergence.tokens[judged, :, method]
    known = np.isfinite(nats).all(axis=1)
    if not known.any() or not tokens[known].sum():
        return {}
    means = nats[known].mean(axis=1)
    (estimate,) = mean_estimates(means[:, None], settings.bootstrap_samples, settings.confidence, seed)
    return {
        "kl": asdict(estimate),
        "kl_per_token": float(nats[known].sum() / tokens[known].sum()),
        "kl_prompts": int(known.sum()),
        "kl_is_unbiased": divergence.sampled[method],
    }


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


def at_equal_length(gains: Floats, words: Floats, base: int) -> Floats | None:
    """Return gains [P, M] less what one common slope of gain by difference of words explains.

    None where there is no slope to be seen: lengths differ, but for each method by the same on every prompt.
    """
    extra = words - words[:, [base]]
    others = [k for k in range(gains.shape[1]) if k != base]
    # The slope within methods: between them length and quality cannot be told apart.
    x = extra[:, others] - extra[:, others].mean(axis=0)
    y = gains[:, others] - gains[:, others].mean(axis=0)
    if np.allclose(x, 0):
        return gains if np.allclose(extra, 0) else None
    result: Floats = gains - float((x * y).sum() / (x * x).sum()) * extra
    return result


def reversals(
    scores: Floats, truth: Floats, names: Sequence[str], settings: EvaluateSection, seed: int
) -> list[tuple[str, str]]:
    """Return the pairs (a, b) of methods of which a surely has the higher score and the lower true quality.

    `scores` and `truth` [P, M]; the intervals are those of paired differences.
    """
    pairs = list(combinations(range(len(names)), 2))
    differences = [np.stack([values[:, a] - values[:, b] for a, b in pairs], axis=1) for values in (scores, truth)]
    judged, true = (
        mean_estimates(values, settings.bootstrap_samples, settings.confidence, seed) for values in differences
    )
    found = []
    for (a, b), score, quality in zip(pairs, judged, true, strict=True):
        if score.low > 0 > quality.high:
            found.append((names[a], names[b]))
        elif score.high < 0 < quality.low:
            found.append((names[b], names[a]))
    return found


def _findings(methods: Mapping[str, Mapping[str, Any]], reversed_pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return which gains are in doubt; where none is, by which checks, of those that could be made."""
    lines = _doubts(methods)
    lines += [f"{a} has a higher score than {b}, and a lower true quality." for a, b in reversed_pairs]
    made = {
        "at_equal_length": "length alone",
        "second_gain": "one reward model alone",
        "true_gain": "a mistake of the reward model",
    }
    checks = [words for key, words in made.items() if all(found.get(key) for found in methods.values())]
    if not lines and checks:
        lines.append(f"No gain rests on {' or on '.join(checks)}, as far as is measured here.")
    if any(found["at_equal_length"] is None for found in methods.values()):
        lines.append("What remains at equal length cannot be told: a method's lengths differ by the same everywhere.")
    return lines


def _doubts(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, found in methods.items():
        if found["gain"]["low"] <= 0:
            continue
        equal = found["at_equal_length"]
        if equal is not None and equal["low"] <= 0:
            lines.append(f"{name} gains, but not surely at equal length.")
        true = found.get("true_gain")
        if true is not None and true["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not surely in true quality: {_interval(true)}.")
        second = found.get("second_gain")
        if second is not None and second["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not surely by the second reward model.")
        elif second is not None and second["high"] < found["gain"]["low"]:
            lines.append(
                f"{name} gains less by the second reward model: {_interval(second)} against {_interval(found['gain'])}."
            )
    return lines


def _distances(methods: Mapping[str, Mapping[str, Any]], baseline: str) -> list[str]:
    """Return which policy has gone farthest, and what its number is where it is no estimate of KL."""
    known = {name: found for name, found in methods.items() if "kl" in found}
    if not known:
        return []
    farthest = max(known, key=lambda name: known[name]["kl"]["mean"])
    one = known[farthest]
    lines = [
        f"{farthest} is farthest from {baseline}: {_interval(one['kl'])} nats an answer, "
        f"{one['kl_per_token']:.2f} a token."
    ]
    if not all(found["kl_is_unbiased"] for found in known.values()):
        lines.append(
            "Answers were not all sampled at temperature 1: for the others KL is the log-ratio of just these answers."
        )
    return lines


def _drawings(methods: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> list[Drawing]:
    """Return the gain against what it took: distance where it is known, and length."""
    prices = {"kl": "KL to the baseline's policy, nats an answer", "words": "more words than the baseline"}
    drawings = []
    for key, label in prices.items():
        points = {name: (found[key]["mean"], found["gain"]) for name, found in methods.items() if key in found}
        if points:
            places = [order.index(name) for name in points]
            picture = draw_gains(f"Gain by {key}", list(points), list(points.values()), places, label)
            drawings.append(Drawing(f"Gain against {'distance' if key == 'kl' else 'length'}", label, picture))
    return drawings


def _table(methods: Mapping[str, Mapping[str, Any]], baseline: str) -> Table:
    names = {"gain": "gain", "at_equal_length": "at equal length", "second_gain": "second model", "words": "words"}
    names |= {"true_gain": "true quality", "kl": "KL", "kl_per_token": "KL a token"}
    used = [key for key in names if any(key in found for found in methods.values())]
    rows = [[method, *(_cell(found.get(key)) for key in used)] for method, found in methods.items()]
    return Table(f"Gain over {baseline}", ["method", *(names[key] for key in used)], rows)


def _cell(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return "cannot be told"
    return f"{value:+.2f}" if isinstance(value, float) else _interval(value)


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
