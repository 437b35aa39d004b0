"""Write the report as `report.json`, `report.md` and `report.html`."""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from offline_align.evaluate import figures
from offline_align.evaluate.ancestry import Ancestor, find_ancestors, find_histograms, read_curves
from offline_align.evaluate.comparison import Comparison, prompt_text
from offline_align.evaluate.page import render_page
from offline_align.evaluate.results import Compared, group_of
from offline_align.evaluate.sections import Section, contents
from offline_align.evaluate.statistics import Floats
from offline_align.evaluate.tables import conditions, headline, markdown_report
from offline_align.lineage import write_atomically

SHOWN_PROMPTS = 200
PREVIEW_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a report is written from."""

    results: Mapping[str, Any]
    compared: Compared | None = None
    sections: Sequence[Section] = ()
    runs: Sequence[Ancestor] = ()
    """The runs in the lineage figure, roots first."""
    samples: Comparison | None = None
    """Answers to show in a report without a judged comparison."""

    def pictures(self) -> dict[str, figures.Picture]:
        """Return the figures that belong to no section, by name."""
        drawn: dict[str, figures.Picture] = {}
        if self.compared is not None:
            drawn |= _compared_figures(self.compared.judgement.scores.mean(axis=1), self.results)
        if self.runs:
            drawn["lineage"] = figures.draw_lineage("Lineage", self.runs)
        if curves := [curve for run in self.runs for curve in read_curves(run)]:
            drawn["training"] = figures.draw_curves("Training", curves)
        return drawn


def runs_behind(compared: Compared | None, named: Sequence[Path] = ()) -> list[Ancestor]:
    """Return the `named` and compared runs and all their ancestors, roots first."""
    files = compared.comparison.files if compared else ()
    return find_ancestors([*(path.parent for path in files), *named])


def write_report(run_dir: Path, report: Report, pictures: Mapping[str, figures.Picture]) -> list[Path]:
    """Write the three files and return their paths, the page last. Raises StorageError."""
    described = {**report.results, **contents(report.sections)}
    if report.compared:
        described["files"] = _files(report.compared.comparison, run_dir)
    if report.compared or report.runs:
        described["lineage"] = _lineage(report.runs, run_dir)
    page = render_page("report.html.j2", _page_values(report, described, pictures))
    written = {
        "report.json": json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown_report(described, report.sections),
        "report.html": page,
    }
    for name, content in written.items():
        write_atomically(run_dir / name, content.encode())
    return [run_dir / name for name in written]


def _files(comparison: Comparison, run_dir: Path) -> dict[str, str]:
    return {column.name: _relative(column.path, run_dir) for column in comparison.columns}


def _lineage(runs: Sequence[Ancestor], run_dir: Path) -> list[dict[str, Any]]:
    return [
        {
            "run": _relative(run.run_dir, run_dir),
            "stage": run.stage,
            "method": run.method,
            "parents": [_relative(parent, run_dir) for parent in run.parents],
        }
        for run in runs
    ]


def _relative(path: Path, run_dir: Path) -> str:
    return os.path.relpath(path.resolve(), run_dir.resolve())


def _page_values(report: Report, results: Mapping[str, Any], pictures: Mapping[str, figures.Picture]) -> dict[str, Any]:
    compared = report.compared
    shown = compared.comparison if compared else report.samples
    values = {
        "results": results,
        "sections": report.sections,
        "headline": headline(results, report.sections),
        "conditions": conditions(results),
        # Safe to mark as HTML: matplotlib's SVG writer has escaped the names.
        "figures": {name: Markup(picture.svg()) for name, picture in pictures.items()},
        "histograms": [_data_uri(path) for path in find_histograms(report.runs)],
        "browser": None,
    }
    if shown is None:
        return values
    scores, quality = (compared.judgement.scores, compared.quality) if compared else (None, None)
    return values | {
        "browser": _browser(shown, scores, quality, results["group_by"]),
        "colours": {m: k % figures.PALETTE for k, m in enumerate(shown.methods)},
    }


def _browser(comparison: Comparison, scores: Floats | None, quality: Floats | None, group_by: str) -> dict[str, Any]:
    """Return the data of the sample browser; without `scores` it shows the answers alone."""
    prompts, samples, _ = comparison.shape
    sets = _shown_prompts(comparison, scores, quality, group_by)
    return {
        "methods": comparison.methods,
        "prompts": prompts,
        "samples_per_prompt": samples,
        "group_by": group_by,
        "sets": sets,
        "targets": [column.name for column in comparison.columns if column.target is not None],
        "groups": list(dict.fromkeys(one["group"] for one in sets if one["group"] is not None)),
    }


def _compared_figures(scores: Floats, results: Mapping[str, Any]) -> dict[str, figures.Picture]:
    methods, overall = results["methods"], results["overall"]
    judged = scores[np.isfinite(scores).all(axis=1)]
    means = [overall[method]["score"] for method in methods]
    reference = overall[results["baseline"]]["score"]["mean"]
    drawn = {
        "score": figures.draw_estimates("Mean score", methods, means, reference),
        "spread": figures.draw_distributions("Spread of scores", methods, judged),
        "rank": figures.draw_rank_scores(
            "Rank score", methods, [overall[method]["rank_score"]["mean"] for method in methods]
        ),
    }
    if all("true_quality" in overall[method] for method in methods):
        truth = [overall[method]["true_quality"] for method in methods]
        reference = overall[results["baseline"]]["true_quality"]["mean"]
        drawn["quality"] = figures.draw_estimates("True quality", methods, truth, reference)
    return drawn


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _shown_prompts(
    comparison: Comparison, scores: Floats | None, quality: Floats | None, group_by: str
) -> list[dict[str, Any]]:
    """Return up to SHOWN_PROMPTS evenly spaced prompts with all their answers."""
    count = len(comparison.prompts)
    chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN_PROMPTS)).round().astype(int)).tolist()
    shown = []
    for p in chosen:
        prompt = comparison.prompts[p]
        text = prompt_text(prompt.prompt)
        one_line = " ".join(text.split())
        preview = one_line[:PREVIEW_CHARACTERS] + "…" * (len(one_line) > PREVIEW_CHARACTERS)
        shown.append(
            {
                "number": p + 1,
                "id": prompt.id,
                "group": group_of(prompt.columns, group_by),
                "text": text,
                "preview": preview,
                "answers": _shown_answers(comparison, scores, quality, p),
            }
        )
    return shown


def _shown_answers(
    comparison: Comparison, scores: Floats | None, quality: Floats | None, p: int
) -> list[dict[str, Any]]:
    result = []
    for s, answers in enumerate(comparison.answers[p]):
        given = None if scores is None else scores[p, s]
        best = None if given is None or not np.isfinite(given).all() else given.max()
        for m, answer in enumerate(answers):
            score = None if given is None else given[m]
            result.append(
                {
                    "method": comparison.methods[m],
                    "sample": s + 1,
                    "response": answer.response,
                    "finish_reason": answer.finish_reason,
                    "condition": answer.condition,
                    "score": None if score is None else f"{score:.2f}" if np.isfinite(score) else "no score",
                    "quality": None if quality is None else f"{quality[p, s, m]:.1f}",
                    "best": best is not None and bool(score == best),
                }
            )
    return result
