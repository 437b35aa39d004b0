"""Format the report's numbers as text for `report.md` and the terminal."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from offline_align.evaluate.sections import Section, Table
from offline_align.wording import counted


def build_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return all tables of the report: overall, win rates, groups, answers."""
    return [
        overall_table(results),
        _win_rate_table(results),
        *_group_tables(results),
        _answer_table(results),
    ]


def overall_table(results: Mapping[str, Any]) -> Table:
    """Return one row per method: score, true quality if known, win rate, rank score, length."""
    lengths = {method: f"{about['mean_words']:.0f}" for method, about in results["answers"].items()}
    table = _method_table(f"All {counted(results['judged_prompts'], 'prompt')}", results, results["overall"])
    rows = [[*row, lengths[method]] for row, method in zip(table.rows, results["methods"], strict=True)]
    return Table(table.title, [*table.header, "mean words"], rows)


def _group_tables(results: Mapping[str, Any]) -> list[Table]:
    return [
        _method_table(
            f"{results['group_by']}: {name} ({counted(group['prompts'], 'prompt')})", results, group["methods"]
        )
        for name, group in results["groups"].items()
    ]


def _method_table(title: str, results: Mapping[str, Any], methods: Mapping[str, Any]) -> Table:
    has_truth = all("true_quality" in found for found in methods.values())
    header = ["method", f"score ({results['judge']['name']})"]
    header += ["true quality"] * has_truth + [f"win rate vs {results['baseline']}", "rank score"]
    rows = []
    for method in results["methods"]:
        found = methods[method]
        row = [method, interval(found["score"])]
        row += [interval(found["true_quality"])] if has_truth else []
        row += ["baseline" if method == results["baseline"] else percent_interval(found["win_rate"])]
        rows.append([*row, interval(found["rank_score"])])
    return Table(title, header, rows)


def _win_rate_table(results: Mapping[str, Any]) -> Table:
    methods = results["methods"]
    rows = [[a, *("" if a == b else percent_interval(results["win_rates"][a][b]) for b in methods)] for a in methods]
    return Table("Win rate of the row's method against the column's", ["method", *methods], rows)


def _answer_table(results: Mapping[str, Any]) -> Table:
    reasons = sorted({reason for about in results["answers"].values() for reason in about["finish_reasons"]})
    header = ["method", "mean characters", "mean words", "empty", "distinct-1", "distinct-2"]
    header += [f"ended: {reason}" for reason in reasons]
    rows = []
    for method, about in results["answers"].items():
        row = [
            method,
            f"{about['mean_characters']:.0f}",
            f"{about['mean_words']:.1f}",
            f"{about['empty']:.1%}",
        ]
        row += [f"{about['distinct_1']:.3f}", f"{about['distinct_2']:.3f}"]
        rows.append([*row, *(f"{about['finish_reasons'].get(reason, 0):.1%}" for reason in reasons)])
    return Table("Answers", header, rows)


def interval(estimate: Mapping[str, float]) -> str:
    """Return `mean [low, high]` with two decimals."""
    return f"{estimate['mean']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def percent_interval(estimate: Mapping[str, float]) -> str:
    """Return a share as `mean% [low, high]` in whole percent."""
    mean, low, high = (100 * estimate[name] for name in ("mean", "low", "high"))
    return f"{mean:.0f}% [{low:.0f}, {high:.0f}]"


def headline(results: Mapping[str, Any], sections: Sequence[Section] = ()) -> str:
    """Return the result in one sentence: the best method, and whether chance could explain it.

    Without a comparison this is the first finding of the sections, or a summary of the runs.
    """
    if "methods" not in results:
        return sections[0].findings[0] if results["judge"] else runs_headline(results["lineage"])
    over_seeds = next((section.content for section in sections if section.name == "seeds"), None)
    if over_seeds is not None:
        return _headline_over_seeds(over_seeds["methods"], over_seeds["baseline"])
    overall, baseline = results["overall"], results["baseline"]
    best = max(_competing(results["methods"]), key=lambda method: overall[method]["score"]["mean"])
    if best == baseline:
        return f"No method scores above the baseline, {baseline}."
    rate = overall[best]["win_rate"]
    text = f"{best} scores highest and wins against {baseline} on {rate['mean']:.0%} of the prompts"
    # A win rate is better than chance if its interval lies above one half.
    return f"{text}." if rate["low"] > 0.5 else f"{text}, which chance could explain."


def _competing(methods: Sequence[str]) -> list[str]:
    """Return the methods without those that were asked for a lower reward than the same policy elsewhere.

    A policy with several targets is several methods, such as `ca(1.1)` and `ca(-1.1)`. The lower
    ones show how far the target steers it; they are not meant to win.
    """
    named = {name: re.fullmatch(r"(.+)\((?:quantile )?(-?\d+(?:\.\d)?)\)", name) for name in methods}
    highest: dict[str, float] = {}
    for found in filter(None, named.values()):
        highest[found[1]] = max(float(found[2]), highest.get(found[1], -math.inf))
    return [name for name, found in named.items() if found is None or float(found[2]) == highest[found[1]]]


def _headline_over_seeds(methods: Mapping[str, Any], baseline: str) -> str:
    best = max(methods, key=lambda name: methods[name]["score"]["mean"])
    if best == baseline:
        return f"No method scores above the baseline, {baseline}, over seeds."
    difference = methods[best]["difference"]
    text = f"{best} scores highest over seeds, {difference['mean']:.2f} above {baseline}"
    # A single seed has no interval, so chance cannot be excluded.
    return f"{text}." if (difference["low"] or 0) > 0 else f"{text}, which the choice of seed could explain."


def runs_headline(lineage: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of runs by stage in one sentence."""
    stages = Counter(run["stage"] for run in lineage)
    named = [stage if number == 1 else f"{number} {stage}" for stage, number in stages.items()]
    return f"{len(lineage)} runs: {', '.join(named)}." if len(lineage) > 1 else f"One run: {named[0]}."


def markdown_report(results: Mapping[str, Any], sections: Sequence[Section] = ()) -> str:
    """Return the content of `report.md`."""
    parts = ["# Evaluation", escape(headline(results, sections)), escape(conditions(results))]
    if "methods" in results:
        for table in build_tables(results):
            parts += [f"## {escape(table.title)}", _markdown_table(table)]
        parts.append(f"Rank score: {results['rank_score']}.")
    for section in sections:
        parts += _markdown_section(section)
    return "\n\n".join(parts) + "\n"


def _markdown_section(section: Section) -> list[str]:
    parts = [f"## {escape(section.title)}", escape(section.note)]
    if section.findings:
        parts.append("\n".join(f"- {escape(finding)}" for finding in section.findings))
    for table in section.tables:
        parts += [f"### {escape(table.title)}", _markdown_table(table)]
    return parts


def conditions(results: Mapping[str, Any]) -> str:
    """Return how the numbers were obtained: judge, prompts, intervals, and what is missing."""
    judge = results["judge"]
    if judge is None:
        return "There were no answers to judge."
    text = f"Judge: {judge['name']}. "
    if "methods" not in results:
        return f"{text}Intervals: {results['confidence']:.0%}, {results['bootstrap_samples']} resamples."
    judged, prompts = results["judged_prompts"], results["prompts"]
    text += (
        counted(prompts, "prompt") if judged == prompts else f"{judged} of {counted(prompts, 'prompt')} could be judged"
    )
    if judged != prompts and judge.get("kind") == "reward_model":
        text += " (an answer that is too long has no score)"
    if results["samples_per_prompt"] > 1:
        text += f", {results['samples_per_prompt']} answers each"
    text += (
        f". Intervals: {results['confidence']:.0%}, {results['bootstrap_samples']} paired resamples "
        f"of the prompts. Ties count as half a win."
    )
    if "unreadable_verdicts" in judge:
        text += (
            f" {judge['unreadable_verdicts']} of {counted(judge['verdicts'], 'verdict')} could not be read; "
            f"{judge['prompt_tokens']:,} tokens sent, {judge['completion_tokens']:,} received."
        )
    if "raters" in judge:
        text += f" {counted(judge['raters'], 'rater')}; {counted(judge['rated_sets'], 'set')} of answers rated in full."
        alpha = judge["krippendorff_alpha"]
        if alpha is not None:
            text += f" Agreement between raters: Krippendorff's alpha {alpha:.2f} (1: identical, 0: chance)."
    return text


def _markdown_table(table: Table) -> str:
    lines = [_line(table.header), _line([":--", *["--:"] * (len(table.header) - 1)])]
    return "\n".join(lines + [_line([escape(cell) for cell in row]) for row in table.rows])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Return text escaped for Markdown, including table cells."""
    for mark in "\\`*_<|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
