"""Which differences are real? Paired tests over prompts, corrected for their number."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "Wilcoxon signed-rank test on the differences between two methods' scores on each prompt; ties are left out. "
    "Holm's correction keeps the probability of any false difference among all pairs below the level."
)


def significance_section(compared: Compared, settings: EvaluateSection) -> Section | None:
    """Return a test of every pair of methods, or None if there is only one method."""
    methods = compared.comparison.methods
    if len(methods) < 2:
        return None
    scores = compared.judgement.scores.mean(axis=1)
    scores = scores[np.isfinite(scores).all(axis=1)]
    pairs = list(combinations(range(len(methods)), 2))
    raw = [signed_rank(scores[:, a], scores[:, b]) for a, b in pairs]
    level = 1 - settings.confidence
    tests = [
        {
            "methods": [methods[a], methods[b]],
            "difference": float((scores[:, a] - scores[:, b]).mean()),
            "p": p,
            "p_holm": corrected,
            "differ": corrected < level,
        }
        for (a, b), p, corrected in zip(pairs, raw, holm(raw), strict=True)
    ]
    differing = sum(bool(one["differ"]) for one in tests)
    finding = f"{differing} of {len(tests)} pairs of methods differ by more than chance at the {level:.0%} level."
    return Section("significance", "Which differences are real?", NOTE, [finding], {"tests": tests}, [_table(tests)])


def signed_rank(first: Floats, second: Floats) -> float:
    """Return the two-sided p value of paired scores [prompts]; 1 if no pair differs."""
    differences = first - second
    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm's step-down procedure, in the given order."""
    order = np.argsort(values, kind="stable")
    scaled = np.array(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]


def _table(tests: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            " − ".join(one["methods"]),
            f"{one['difference']:+.3f}",
            *(_p(one[name]) for name in ("p", "p_holm")),
            "yes" if one["differ"] else "no",
        ]
        for one in tests
    ]
    return Table("All pairs of methods", ["pair", "difference of mean scores", "p", "p (Holm)", "differ"], rows)


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
