"""Can this judge be trusted? Its agreement with people, its biases and its calibration."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.calibration.agreement import Verdicts, agreement
from offline_align.evaluate.calibration.reliability import reliability
from offline_align.evaluate.figures import draw_reliability
from offline_align.evaluate.sections import Drawing, Section, Table

NOTE = (
    "Pairs of answers with human verdicts, scored by the judge of this report in both orders. Intervals resample whole "
    "prompts. A tie of the judge counts as half right; pairs on which people tie count only in kappa."
)
_ROWS = {
    "accuracy": "accuracy: people's choice scored higher",
    "swapped_accuracy": "accuracy with people's verdicts swapped",
    "kappa": "Cohen's kappa, pairs on which people prefer one answer",
    "kappa_with_ties": "Cohen's kappa, ties as a third verdict",
    "length_only_accuracy": "accuracy of 'the longer answer is better'",
    "gain_over_length": "accuracy minus that of this rule",
    "judge_prefers_longer": "judge prefers the longer answer",
    "people_prefer_longer": "people prefer the longer answer",
    "judge_ties": "judge ties",
    "same_in_both_orders": "same verdict in both orders",
    "first_shown_wins": "answer shown first wins",
}


def calibration_section(verdicts: Verdicts, settings: EvaluateSection, seed: int) -> Section:
    """Return agreement with people, biases and reliability."""
    found = agreement(verdicts, settings, seed)
    decided = np.isfinite(verdicts.margins) & (verdicts.people != 0)
    fit = reliability((verdicts.margins * verdicts.people)[decided]) if decided.any() else None
    drawings = []
    if fit is not None:
        picture = draw_reliability("Reliability", fit["bins"], fit["tempered_bins"])
        note = "ten bins of equal size; a calibrated judge lies on the dashed line"
        drawings.append(Drawing("Reliability", note, picture))
    return Section(
        name="calibration",
        title="Can this judge be trusted?",
        note=NOTE,
        findings=_findings(found, fit),
        content={"agreement": found, "reliability": fit},
        tables=_tables(found, fit),
        drawings=drawings,
    )


def _findings(found: Mapping[str, Any], fit: Mapping[str, Any] | None) -> list[str]:
    if fit is None:
        return ["No pair has both a human preference and a score of the judge."]
    accuracy, length = found["accuracy"], found["length_only_accuracy"]
    lines = [
        f"The judge agrees with people on {_percent(accuracy)} of {found['decided_pairs']} pairs; "
        f"preferring the longer answer would be right on {length['mean']:.1%}{_against(found['gain_over_length'])}."
    ]
    people = found["people_with_each_other"]
    if people:
        lines.append(
            f"Two people agree with each other on {people['agreement']:.1%} of {people['doubles']} pairs of verdicts."
        )
    longer, theirs = found["judge_prefers_longer"], found["people_prefer_longer"]
    if longer["low"] is not None and not longer["low"] <= theirs["mean"] <= longer["high"]:
        lines.append(
            f"The judge prefers the longer answer on {_percent(longer)} of the pairs, people on {theirs['mean']:.1%}."
        )
    first = found["first_shown_wins"]
    if not first["low"] <= 0.5 <= first["high"]:
        lines.append(f"Position bias: the answer shown first wins {_percent(first)} of the verdicts.")
    return [*lines, _calibration(fit)]


def _against(gain: Mapping[str, Any]) -> str:
    """Return a clause on whether the judge beats the length rule, from their paired difference."""
    if gain["low"] > 0:
        return ""
    return ", which is better than this judge" if gain["high"] < 0 else ", which it does not significantly beat"


def _calibration(fit: Mapping[str, Any]) -> str:
    error, tempered = fit["expected_calibration_error"], fit["tempered_expected_calibration_error"]
    if fit["temperature_at_bound"] and fit["temperature"] > 1:
        return "The size of the judge's margins does not predict people's choices: no finite temperature calibrates it."
    return (
        f"The expected calibration error is {error:.3f}, or {tempered:.3f} with margins divided by "
        f"{fit['temperature']:.2f} (fitted on the same pairs)."
    )


def _tables(found: Mapping[str, Any], fit: Mapping[str, Any] | None) -> list[Table]:
    title = f"{found['pairs']} pairs: {found['decided_pairs']} with a preference, {found['people_ties']} human ties"
    title += f", {found['without_verdict']} without a score" * bool(found["without_verdict"])
    kappas = ("kappa", "kappa_with_ties")
    rows = [[text, _number(found[name]) if name in kappas else _percent(found[name])] for name, text in _ROWS.items()]
    change = found["largest_order_difference"]
    rows.append(["largest change of a margin between orders", "none" if change is None else f"{change:.3g}"])
    tables = [Table(title, ["measure", "value"], rows)]
    if len(found["by_source"]) > 1:
        groups = [[name, *_beside_length(one)] for name, one in found["by_source"].items()]
        tables.append(Table("Accuracy by source", ["source", "pairs", "accuracy", "longer answer"], groups))
    lengths = [
        [f"{one['from_characters']:+,} to {one['to_characters']:+,}", *_beside_length(one)]
        for one in found["by_length"]
    ]
    header = ["extra characters of people's choice", "pairs", "accuracy", "longer answer"]
    tables.append(Table("Accuracy by difference in length", header, lengths))
    return [*tables, *([_reliability_table(fit)] if fit else [])]


def _beside_length(one: Mapping[str, Any]) -> list[str]:
    """Return number of pairs, accuracy, and the accuracy of 'the longer answer is better'."""
    return [str(one["pairs"]), _percent(one), f"{one['length_only']:.1%}"]


def _reliability_table(fit: Mapping[str, Any]) -> Table:
    names = {"expected calibration error": "expected_calibration_error", "log loss (a coin: 0.693)": "log_loss"}
    rows = [[text, f"{fit[name]:.3f}", f"{fit[f'tempered_{name}']:.3f}"] for text, name in names.items()]
    return Table("Calibration", ["measure", "as scored", f"margins / {fit['temperature']:.2f}"], rows)


def _percent(one: Mapping[str, Any]) -> str:
    if one["mean"] is None:
        return "none"
    return f"{one['mean']:.1%} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"


def _number(one: Mapping[str, Any]) -> str:
    return "none" if one["mean"] is None else f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
