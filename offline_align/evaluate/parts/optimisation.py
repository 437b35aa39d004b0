"""Is the gain real, or over-optimisation of the reward model?

Compares the gain by the judge with the gain at equal length, by a second reward model and in true
quality, and shows the divergence from the baseline's policy.

Every gain is over the baseline on the same prompts, so intervals are paired. Gains of reward models
are in standard deviations of the baseline's scores, which puts two models on one scale.
"""

from collections import Counter
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
from offline_align.evaluate.parts.seeds import find_pools
from offline_align.evaluate.resampling import mean_estimates
from offline_align.evaluate.results import Compared, choose_baseline
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "A policy that exploits a weakness of one reward model gains by that model but not by another. Gains are over the "
    "baseline on the same prompts; gains in score are in standard deviations of the baseline's scores. The gain at "
    "equal length is corrected for longer answers by a linear fit of gain on extra words, shared by all methods."
)
TRUTH_NOTE = (
    " True quality is known for the demo corpus, from 0 to 10. A gain in score without a gain in true quality is an "
    "error of the reward model."
)
DIVERGENCE_NOTE = (
    " KL is the mean log-likelihood of a method's own answers under its policy minus that under the baseline's policy, "
    "in nats per answer and per token."
)


def optimisation_section(
    compared: Compared,
    settings: EvaluateSection,
    seed: int,
    second: Floats | None,
    second_name: str | None,
    divergence: Divergence | None = None,
) -> Section | None:
    """Return the checks of every gain, or None if there is only one method or no judged prompt.

    `second` [prompts, samples, methods] holds the scores of the second reward model.
    """
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
    pools = {name: [comparison.methods[k] for k in found] for name, found in find_pools(comparison).items()}
    others = [k for k in range(len(comparison.methods)) if k != base]
    methods: dict[str, dict[str, Any]] = {
        comparison.methods[k]: {"at_equal_length": None} | {name: asdict(v[k]) for name, v in estimates.items()}
        for k in others
    }
    if divergence is not None:
        for k in others:
            methods[comparison.methods[k]] |= kl_of(divergence, k, judged, settings, seed)
    return Section(
        name="optimisation",
        title="Is the gain real?",
        note=NOTE + TRUTH_NOTE * (truth is not None) + DIVERGENCE_NOTE * (divergence is not None),
        findings=_findings(methods, reversed_pairs, pools) + _distances(methods, baseline),
        content={"baseline": baseline, "second_model": second_name, "methods": methods},
        tables=[_table(methods, baseline)],
        drawings=_drawings(methods, comparison.methods),
    )


def kl_of(
    divergence: Divergence, method: int, judged: NDArray[np.bool_], settings: EvaluateSection, seed: int
) -> dict[str, Any]:
    """Return KL in nats per answer, with its interval, and per token; empty if unknown."""
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
    """Return the mean number of words of the answers to each prompt [prompts, methods]."""
    lengths = [
        [[len(answer.response.split()) for answer in answers] for answers in samples] for samples in comparison.answers
    ]
    result: Floats = np.array(lengths, dtype=np.float64).mean(axis=1)
    return result


def standardised_gains(scores: Floats, base: int) -> Floats:
    """Return scores [P, M] minus the baseline's, in standard deviations of the baseline's scores.

    If the baseline's scores are all equal, the judge's own unit is kept.
    """
    spread = scores[:, base].std() or 1.0
    result: Floats = (scores - scores[:, [base]]) / spread
    return result


def at_equal_length(gains: Floats, words: Floats, base: int) -> Floats | None:
    """Return gains [P, M] minus the part that extra words explain, with one slope for all methods.

    Returns None if the slope cannot be estimated: lengths differ, but for each method by the same
    number of words on every prompt.
    """
    extra = words - words[:, [base]]
    others = [k for k in range(gains.shape[1]) if k != base]
    # The slope within methods; between methods, length and quality are confounded.
    x = extra[:, others] - extra[:, others].mean(axis=0)
    y = gains[:, others] - gains[:, others].mean(axis=0)
    if np.allclose(x, 0):
        return gains if np.allclose(extra, 0) else None
    result: Floats = gains - float((x * y).sum() / (x * x).sum()) * extra
    return result


def reversals(
    scores: Floats, truth: Floats, names: Sequence[str], settings: EvaluateSection, seed: int
) -> list[tuple[str, str]]:
    """Return the pairs (a, b) in which method a scores higher but has lower true quality.

    `scores` and `truth` are [P, M]. Both intervals of the paired differences must exclude 0.
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


def wrong_order(reversed_pairs: Sequence[tuple[str, str]], pools: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each two methods that the judge puts in the wrong order.

    `pools` has the policies of each method, which differ in their seed. Pairs of one method are left out.
    """
    method_of = {name: pool for pool, names in pools.items() for name in names}
    found = Counter((method_of[a], method_of[b]) for a, b in reversed_pairs)
    lines = []
    for (a, b), count in found.items():
        if a != b:
            pairs = len(pools[a]) * len(pools[b])
            seeds = f", in {count} of {pairs} pairs of seeds" if pairs > 1 else ""
            lines.append(f"{a} has a higher score than {b} but a lower true quality{seeds}.")
    return lines


def _findings(
    methods: Mapping[str, Mapping[str, Any]],
    reversed_pairs: Sequence[tuple[str, str]],
    pools: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return the gains in doubt or, if there are none, the checks that all gains passed."""
    lines = _doubts(methods) + wrong_order(reversed_pairs, pools)
    made = {
        "at_equal_length": "length alone",
        "second_gain": "one reward model alone",
        "true_gain": "an error of the reward model",
    }
    checks = [words for key, words in made.items() if all(found.get(key) for found in methods.values())]
    if not lines and checks:
        lines.append(f"No gain is due to {' or to '.join(checks)}, as far as measured here.")
    if any(found["at_equal_length"] is None for found in methods.values()):
        lines.append(
            "The gain at equal length is unknown: each method's answers differ in length from the baseline's by the "
            "same number of words on every prompt."
        )
    return lines


def _doubts(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, found in methods.items():
        if found["gain"]["low"] <= 0:
            continue
        equal = found["at_equal_length"]
        if equal is not None and equal["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not significantly at equal length.")
        true = found.get("true_gain")
        if true is not None and true["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not significantly in true quality: {_interval(true)}.")
        second = found.get("second_gain")
        if second is not None and second["low"] <= 0:
            lines.append(f"{name} gains by the judge, but not significantly by the second reward model.")
        elif second is not None and second["high"] < found["gain"]["low"]:
            lines.append(
                f"{name} gains less by the second reward model: {_interval(second)} instead of "
                f"{_interval(found['gain'])}."
            )
    return lines


def _distances(methods: Mapping[str, Mapping[str, Any]], baseline: str) -> list[str]:
    """Return the policy with the largest KL, and a caveat if some KL estimates are biased."""
    known = {name: found for name, found in methods.items() if "kl" in found}
    if not known:
        return []
    farthest = max(known, key=lambda name: known[name]["kl"]["mean"])
    one = known[farthest]
    lines = [
        f"{farthest} diverges most from {baseline}: KL {_interval(one['kl'])} nats per answer, "
        f"{one['kl_per_token']:.2f} per token."
    ]
    if not all(found["kl_is_unbiased"] for found in known.values()):
        lines.append(
            "Not all answers were sampled at temperature 1; for the others, KL is only the mean log-ratio of the "
            "answers."
        )
    return lines


def _drawings(methods: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> list[Drawing]:
    """Return the gain against KL (if known) and against length."""
    prices = {"kl": "KL to the baseline's policy, nats per answer", "words": "more words than the baseline"}
    drawings = []
    for key, label in prices.items():
        points = {name: (found[key]["mean"], found["gain"]) for name, found in methods.items() if key in found}
        if points:
            places = [order.index(name) for name in points]
            picture = draw_gains(f"Gain by {key}", list(points), list(points.values()), places, label)
            drawings.append(Drawing(f"Gain against {'KL' if key == 'kl' else 'length'}", label, picture))
    return drawings


def _table(methods: Mapping[str, Mapping[str, Any]], baseline: str) -> Table:
    names = {"gain": "gain", "at_equal_length": "at equal length", "second_gain": "second model", "words": "words"}
    names |= {"true_gain": "true quality", "kl": "KL", "kl_per_token": "KL per token"}
    used = [key for key in names if any(key in found for found in methods.values())]
    rows = [[method, *(_cell(found.get(key)) for key in used)] for method, found in methods.items()]
    return Table(f"Gain over {baseline}", ["method", *(names[key] for key in used)], rows)


def _cell(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:+.2f}" if isinstance(value, float) else _interval(value)


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
