"""Compute the results of a comparison as plain data: the main part of `report.json`."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline_align.config.sections import EvaluateSection
from offline_align.errors import ConfigError, DataError
from offline_align.evaluate.comparison import Answer, Column, Comparison, competing
from offline_align.evaluate.resampling import Estimate, mean_estimates
from offline_align.evaluate.statistics import Floats, distinct_n, rank_scores, wins
from offline_align.wording import counted

Booleans = NDArray[np.bool_]
FORMAT = 1
RANK_SCORE = "(number of methods + 1) - rank, ties share the mean rank, mean over prompts; the paper's 6 - rank"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's scores [prompts, samples, methods], NaN if missing, with its name and details."""

    name: str
    scores: Floats
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compared:
    """The answers of the methods, the judge's scores, and the true quality if it is known."""

    comparison: Comparison
    judgement: Judgement
    quality: Floats | None = None
    """In the shape of the scores."""


def build_results(compared: Compared, settings: EvaluateSection, seed: int) -> dict[str, Any]:
    """Return the report's content. Means are over the samples of each prompt, then over prompts.

    Prompts with a missing score are counted and left out of all comparisons. Raises DataError if
    none is left, ConfigError for an unknown baseline.
    """
    comparison, judgement, quality = compared.comparison, compared.judgement, compared.quality
    scores = judgement.scores.mean(axis=1)
    judged = np.isfinite(scores).all(axis=1)
    if not judged.any():
        raise DataError(f"judge {judgement.name}: no prompt has a score for every method; check replies and answers")
    if not judged.all():
        lost, where = int((~judged).sum()), ""
        if judgement.details.get("kind") == "openai":
            where = "; the replies are in verdicts.jsonl"
        log.warning("left out of %s without a readable score: %d%s", counted(judged.size, "prompt"), lost, where)
    baseline = choose_baseline(comparison.columns, settings.baseline)
    truth = None if quality is None else quality.mean(axis=1)
    tables = _Tables(comparison, scores, truth, baseline, settings, seed)
    return {
        "format": FORMAT,
        "methods": list(comparison.methods),
        "competing": [comparison.methods[k] for k in competing(comparison.columns)],
        "baseline": baseline,
        "judge": {"name": judgement.name, **judgement.details},
        "prompts": int(judged.size),
        "judged_prompts": int(judged.sum()),
        "samples_per_prompt": comparison.shape[1],
        "confidence": settings.confidence,
        "bootstrap_samples": settings.bootstrap_samples,
        "seed": seed,
        "rank_score": RANK_SCORE,
        "overall": tables.methods(judged),
        "win_rates": tables.win_rates(judged),
        "answers": {method: describe_answers(comparison.of_method(k)) for k, method in enumerate(comparison.methods)},
        "group_by": settings.group_by,
        "groups": tables.groups(judged),
        "rows": _rows(comparison, scores, truth, settings.group_by),
    }


def choose_baseline(columns: Sequence[Column], wanted: str | None) -> str:
    """Return the baseline: `wanted`, else SFT (its first seed), else the first method.

    Raises ConfigError if `wanted` is not among the methods.
    """
    methods = [column.name for column in columns]
    if wanted is None:
        return next((column.name for column in columns if "sft" in (column.name, column.pool)), methods[0])
    if wanted not in methods:
        raise ConfigError(f"evaluate.baseline={wanted}: no such method; there are {', '.join(methods)}")
    return wanted


@dataclass(frozen=True, slots=True)
class _Tables:
    comparison: Comparison
    scores: Floats
    quality: Floats | None
    baseline: str
    settings: EvaluateSection
    seed: int

    def methods(self, chosen: Booleans) -> dict[str, dict[str, Any]]:
        """Return each method's means over the `chosen` prompts [prompts]."""
        scores = self.scores[chosen]
        versus = wins(scores)[:, :, self.comparison.methods.index(self.baseline)]
        columns = {"score": scores, "win_rate": versus, "rank_score": rank_scores(scores)}
        if self.quality is not None:
            columns["true_quality"] = self.quality[chosen]
        estimates = {name: self._estimates(values) for name, values in columns.items()}
        return {
            method: {name: asdict(found[k]) for name, found in estimates.items()}
            for k, method in enumerate(self.comparison.methods)
        }

    def win_rates(self, chosen: Booleans) -> dict[str, dict[str, Any]]:
        """Return how often the outer key's method beats the inner key's; a tie counts half."""
        methods = self.comparison.methods
        table = wins(self.scores[chosen])
        flat = self._estimates(table.reshape(len(table), -1))
        return {
            a: {b: asdict(flat[i * len(methods) + j]) for j, b in enumerate(methods) if a != b}
            for i, a in enumerate(methods)
        }

    def groups(self, judged: Booleans) -> dict[str, Any]:
        """Return the means for each value of the `group_by` column, in order of appearance."""
        labels = [group_of(prompt.columns, self.settings.group_by) for prompt in self.comparison.prompts]
        result = {}
        for label in dict.fromkeys(label for label in labels if label is not None):
            chosen = judged & np.array([other == label for other in labels])
            if chosen.any():
                result[label] = {"prompts": int(chosen.sum()), "methods": self.methods(chosen)}
        return result

    def _estimates(self, values: Floats) -> list[Estimate]:
        return mean_estimates(values, self.settings.bootstrap_samples, self.settings.confidence, self.seed)


def group_of(columns: dict[str, Any], group_by: str) -> str | None:
    """Return the group of a prompt, or None if it has no such column."""
    value = columns.get(group_by)
    return None if value is None else str(value)


def describe_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return mean lengths, shares of finish reasons and diversity of one method's answers."""
    texts = [answer.response for answer in answers]
    reasons = Counter(answer.finish_reason for answer in answers)
    conditions = sorted({answer.condition for answer in answers if answer.condition is not None})
    return {
        "mean_characters": fmean(map(len, texts)),
        "mean_words": fmean(len(text.split()) for text in texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "finish_reasons": {reason: count / len(texts) for reason, count in sorted(reasons.items())},
        "conditions": conditions,
    }


def _rows(comparison: Comparison, scores: Floats, quality: Floats | None, group_by: str) -> list[dict[str, Any]]:
    rows = []
    for k, prompt in enumerate(comparison.prompts):
        row: dict[str, Any] = {"id": prompt.id, "group": group_of(prompt.columns, group_by)}
        row["scores"] = _by_method(comparison.methods, scores[k])
        if quality is not None:
            row["true_quality"] = _by_method(comparison.methods, quality[k])
        rows.append(row)
    return rows


def _by_method(methods: Sequence[str], values: Floats) -> dict[str, float | None]:
    return {m: float(v) if np.isfinite(v) else None for m, v in zip(methods, values, strict=True)}
