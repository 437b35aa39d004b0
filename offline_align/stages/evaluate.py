"""`evaluate`: several generation files and a judge become tables, intervals and a page."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from offline_align import lineage
from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import JudgeKind
from offline_align.data.records import input_paths
from offline_align.evaluate.comparison import Comparison, load_comparison, name_methods
from offline_align.evaluate.judges import Judge, build_judge
from offline_align.evaluate.judges.ground_truth import GroundTruthJudge, is_demo_prompt
from offline_align.evaluate.judges.reward_model import RewardModelJudge
from offline_align.evaluate.report import write_report
from offline_align.evaluate.results import Judgement, build_results, choose_baseline
from offline_align.evaluate.statistics import Floats
from offline_align.evaluate.tables import headline, overall_table
from offline_align.stages import common

STAGE = "evaluate"
# What judges leave in the run folder beside the report.
RECORDS = ("quarantine.jsonl", "verdicts.jsonl", "rating.html", "ratings*.jsonl")

logger = logging.getLogger(__name__)


def run(config: EvaluateRun, explicit: frozenset[str]) -> int:
    """Write report.json, report.md and report.html into `run.dir`, print the result and return 0.

    All ranks score with a reward model; one rank does everything else. Raises ConfigError, DataError,
    StorageError, and StoppedEarly where the judge is not done yet.
    """
    files = input_paths(config.data.input, "data.input")
    choose_baseline(name_methods(files), config.evaluate.baseline)
    judge = build_judge(config)
    if config.dry_run:
        Console(soft_wrap=True).print(Text(_plan(config, files, judge)))
        return 0
    is_main = int(os.environ.get("RANK", "0")) == 0
    if not is_main and config.judge.kind is not JudgeKind.reward_model:
        return 0
    key = common.key_of(STAGE, config)
    if common.is_finished(STAGE, config, key):
        return 0
    comparison = load_comparison(files, common.bad_rows(config, writes=is_main))
    scores = _scores(judge, comparison)
    if is_main:
        _report(config, key, comparison, Judgement(judge.name, scores, judge.describe()), judge)
    return 0


def _scores(judge: Judge, comparison: Comparison) -> Floats:
    """Return the judge's scores [prompts, samples, methods]."""
    return np.array(judge.score(comparison.samples()), dtype=np.float64).reshape(comparison.shape)


def _report(config: EvaluateRun, key: str, comparison: Comparison, judgement: Judgement, judge: Judge) -> None:
    run_dir = common.start_folder(config)
    # Shown beside another judge's scores; as the judge it is the scores.
    quality = None if config.judge.kind is JudgeKind.ground_truth else _true_quality(comparison)
    results = build_results(comparison, judgement, quality, config.evaluate, config.run.seed)
    outputs = write_report(run_dir, comparison, judgement, quality, results)
    records = [path for pattern in RECORDS for path in sorted(run_dir.glob(pattern))]
    parents = [judge.checkpoint] if isinstance(judge, RewardModelJudge) else []
    extra = {"judge": results["judge"], "methods": results["methods"]}
    lineage.write_manifest(run_dir, STAGE, key, comparison.files, parents, [*outputs, *records], extra)
    _print(results, outputs[-1])


def _true_quality(comparison: Comparison) -> Floats | None:
    """Return the known quality of all answers where every prompt is of the demo corpus."""
    if not all(is_demo_prompt(prompt.prompt) for prompt in comparison.prompts):
        return None
    return _scores(GroundTruthJudge(), comparison)


def _plan(config: EvaluateRun, files: list[Path], judge: Judge) -> str:
    lines = [f"evaluate with {judge.name}, into {config.run.dir}"]
    lines += [f"  {name}: {path}" for name, path in zip(name_methods(files), files, strict=True)]
    return "\n".join(lines)


def _print(results: dict[str, Any], page: Path) -> None:
    terminal = Console()
    # A log has no width of its own: a table folded to 80 columns could not be read there.
    console = terminal if terminal.is_terminal else Console(width=160)
    table = overall_table(results)
    shown = RichTable(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(table.header):
        width = max(len(row[k]) for row in table.rows)
        shown.add_column(Text(name), justify="right" if k else "left", min_width=width)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    console.print(Text(headline(results)), soft_wrap=True)
    console.print(Text(f"report: {page}"), soft_wrap=True)
