"""Writes the report: `report.json` for programs, `report.md` for a terminal, `report.html` for people."""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from offline_align.evaluate import figures
from offline_align.evaluate.ancestry import Ancestor, find_ancestors, find_histograms, read_curve
from offline_align.evaluate.comparison import Comparison, prompt_text
from offline_align.evaluate.page import render_page
from offline_align.evaluate.results import Compared, group_of
from offline_align.evaluate.sections import Section, contents
from offline_align.evaluate.statistics import Floats
from offline_align.evaluate.tables import conditions, headline, markdown_report
from offline_align.lineage import write_atomically

SHOWN_PROMPTS = 200
PREVIEW_CHARACTERS = 160


def write_report(
    run_dir: Path, compared: Compared | None, results: Mapping[str, Any], sections: Sequence[Section] = ()
) -> list[Path]:
    """Write the three files and return their paths, the page last. Raises StorageError."""
    files = compared.comparison.files if compared else ()
    runs = find_ancestors(path.parent for path in files)
    described = {**results, **contents(sections)}
    if compared:
        described |= {"files": _files(compared.comparison, run_dir), "lineage": _lineage(runs, run_dir)}
    page = render_page("report.html.j2", _page_values(compared, described, sections, runs))
    written = {
        "report.json": json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown_report(described, sections),
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


def _page_values(
    compared: Compared | None, results: Mapping[str, Any], sections: Sequence[Section], runs: Sequence[Ancestor]
) -> dict[str, Any]:
    values = {
        "results": results,
        "sections": sections,
        "headline": headline(results, sections),
        "conditions": conditions(results),
        "curves": _curves(runs),
        "graph": Markup(figures.draw_lineage("Lineage", runs)) if runs else None,
        "histograms": [_data_uri(path) for path in find_histograms(runs)],
    }
    return values | (_compared_values(compared, results) if compared else {})


def _compared_values(compared: Compared, results: Mapping[str, Any]) -> dict[str, Any]:
    comparison, scores = compared.comparison, compared.judgement.scores
    sets = _shown_prompts(comparison, scores, compared.quality, results["group_by"])
    return {
        "figures": _figures(scores.mean(axis=1), results),
        "sets": sets,
        "colours": {m: k % figures.PALETTE for k, m in enumerate(comparison.methods)},
        "targets": [column.name for column in comparison.columns if column.target is not None],
        "groups": list(dict.fromkeys(one["group"] for one in sets if one["group"] is not None)),
    }


def _figures(scores: Floats, results: Mapping[str, Any]) -> dict[str, Markup]:
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
    # Drawn by ourselves: names are escaped by the SVG writer.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _curves(runs: Sequence[Ancestor]) -> Markup | None:
    curves = [curve for run in runs if (curve := read_curve(run)) is not None]
    return Markup(figures.draw_curves("Training loss", curves)) if curves else None


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _shown_prompts(
    comparison: Comparison, scores: Floats, quality: Floats | None, group_by: str
) -> list[dict[str, Any]]:
    """Return the prompts of the browser with all their answers, spread evenly where there are too many."""
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


def _shown_answers(comparison: Comparison, scores: Floats, quality: Floats | None, p: int) -> list[dict[str, Any]]:
    result = []
    for s, answers in enumerate(comparison.answers[p]):
        best = np.max(scores[p, s]) if np.isfinite(scores[p, s]).all() else None
        for m, answer in enumerate(answers):
            score = scores[p, s, m]
            result.append(
                {
                    "method": comparison.methods[m],
                    "sample": s + 1,
                    "response": answer.response,
                    "finish_reason": answer.finish_reason,
                    "condition": answer.condition,
                    "score": f"{score:.2f}" if np.isfinite(score) else "no score",
                    "quality": None if quality is None else f"{quality[p, s, m]:.1f}",
                    "best": best is not None and bool(score == best),
                }
            )
    return result
