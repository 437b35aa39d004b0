"""Have rewards drifted? Rewards of policy answers against those of the labelled training rows.

If a policy's answers score outside the range of the labels, the reward model extrapolates and its
scores are less reliable. Rewards are normalised with the mean and standard deviation of the
labelled set.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from offline_align.evaluate.ancestry import find_ancestors
from offline_align.evaluate.figures import draw_drift
from offline_align.evaluate.parts.label_set import LabelSet, find_label_set
from offline_align.evaluate.results import Compared
from offline_align.evaluate.sections import Drawing, Section, Table
from offline_align.evaluate.statistics import Floats

NOTE = (
    "KS is the largest distance between two distribution functions: 0 if they are equal, 1 if the ranges do not "
    "overlap. PSI (population stability index) compares shares in ten bins that each hold a tenth of the labelled "
    "rows: below 0.1 the shift is small, above 0.25 it is large. Tails are the shares of answers below the 1% and "
    "above the 99% quantile of the labelled rows. Beyond is the share outside the range of the labelled rows."
)
BINS = 10
TAIL = 0.01
MUCH = 0.25
# An empty bin counts as half a row; otherwise the index would be infinite.
_EMPTY = 0.5


def drift_section(compared: Compared, judge_content: str | None) -> Section | None:
    """Return the drift from the labelled set, or None if the judge did not label it."""
    comparison = compared.comparison
    labels = find_label_set(comparison.files)
    if labels is None or not labels.is_scored_by(judge_content):
        return None
    parts = read_parts(labels)
    reference = np.concatenate(list(parts.values()))
    if not reference.size:
        return None
    scores = labels.normalised(compared.judgement.scores)
    policies = {name: scores[:, :, k].ravel() for k, name in enumerate(comparison.methods)}
    scored = {name: values[np.isfinite(values)] for name, values in policies.items()}
    groups = parts | {name: values for name, values in scored.items() if values.size}
    found = {name: drift(reference, values) for name, values in groups.items()}
    content = {"label_set": labels.run_dir.name, "rows": int(reference.size), "groups": found}
    drawing = Drawing("Normalised rewards", "median, middle half and middle 90%", draw_drift("Drift", groups))
    findings = _findings(found, list(policies))
    return Section("drift", "Have rewards drifted?", NOTE, findings, content, [_table(found)], [drawing])


def read_parts(labels: LabelSet) -> dict[str, Floats]:
    """Return the normalised rewards of the labelled rows and, separately, of preference pairs.

    Pairs are named as the reward model's training pairs if it was trained on the labelled file.
    """
    parts: dict[str, list[float]] = {"rows": [], "pairs": []}
    with (labels.run_dir / "labelled.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            parts["pairs" if "answer" in row else "rows"].append(float(row["reward"]))
    name = "reward model's training pairs" if _trained_on_labelled_file(labels.run_dir) else "labelled pairs"
    named = {"labelled SFT rows": parts["rows"], name: parts["pairs"]}
    return {key: np.array(values) for key, values in named.items() if values}


def _trained_on_labelled_file(label_dir: Path) -> bool:
    runs = find_ancestors([label_dir])
    read: dict[str, set[str]] = {run.stage: {record.sha256 for record in run.manifest.inputs} for run in runs}
    return bool(read.get("reward", set()) & read.get("label", set()))


def drift(reference: Floats, values: Floats) -> dict[str, float | int]:
    """Return KS statistic, PSI and tail shares of `values` [N] against `reference` [R]."""
    low, high = np.quantile(reference, [TAIL, 1 - TAIL])
    return {
        "answers": int(values.size),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "ks": float(ks_2samp(reference, values).statistic),
        "psi": population_stability(reference, values),
        "below_low_tail": float((values < low).mean()),
        "above_high_tail": float((values > high).mean()),
        "beyond": float(((values < reference.min()) | (values > reference.max())).mean()),
    }


def population_stability(reference: Floats, values: Floats) -> float:
    """Return the sum over bins of (q - p) log(q / p), with p of `reference` and q of `values`.

    Bins are deciles of the reference; equal rewards merge bins.
    """
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    counts = [np.bincount(np.searchsorted(edges, one), minlength=len(edges) + 1) for one in (reference, values)]
    used = counts[0] + counts[1] > 0
    p, q = (np.maximum(one[used], _EMPTY) / one.sum() for one in counts)
    return float(((q - p) * np.log(q / p)).sum())


def _findings(found: Mapping[str, Mapping[str, Any]], policies: Sequence[str]) -> list[str]:
    lines = []
    for name in policies:
        one = found.get(name)
        if one is not None and one["beyond"] > 0:
            lines.append(f"{name}: {one['beyond']:.0%} of its answers score outside the range of the labelled rows.")
    moved = [name for name in found if name not in policies and found[name]["psi"] > MUCH]
    lines += [f"The rewards of {name} differ strongly from those of all labelled rows." for name in moved]
    return lines or ["No answer scores outside the range of the labelled rows."]


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    header = ["answers of", "number", "mean", "std", "KS", "PSI", "low tail", "high tail", "beyond"]
    rows = [
        [name, f"{one['answers']:,}", *(f"{one[key]:.2f}" for key in ("mean", "std", "ks", "psi"))]
        + [f"{one[key]:.1%}" for key in ("below_low_tail", "above_high_tail", "beyond")]
        for name, one in found.items()
    ]
    return Table("Normalised rewards against all labelled rows", header, rows)
