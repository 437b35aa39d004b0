"""`evaluate`: compare generation files with a judge; write tables, intervals and a page."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import JudgeKind, Template
from offline_align.data.records import BadRows, input_paths
from offline_align.errors import ConfigError
from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.calibration.agreement import Verdicts
from offline_align.evaluate.calibration.pairs import JudgedPair, both_orders, read_judged_pairs
from offline_align.evaluate.comparison import Comparison, load_comparison, name_columns
from offline_align.evaluate.divergence import Divergence, measure_divergence
from offline_align.evaluate.judges import Judge, build_judge
from offline_align.evaluate.judges.ground_truth import GroundTruthJudge, is_demo_prompt
from offline_align.evaluate.judges.reward_model import RewardModelJudge, open_reward_model, second_reward_model
from offline_align.evaluate.other_judges import other_verdicts
from offline_align.evaluate.parts.catalogue import Evidence, report_sections
from offline_align.evaluate.parts.study import Verdict
from offline_align.evaluate.report import Report, runs_behind, write_report
from offline_align.evaluate.results import FORMAT, Compared, Judgement, build_results, choose_baseline
from offline_align.evaluate.samples import samples_of_runs
from offline_align.evaluate.sections import Table
from offline_align.evaluate.statistics import Floats
from offline_align.evaluate.tables import headline, overall_table
from offline_align.evaluate.tensorboard import write_board
from offline_align.lineage import effort
from offline_align.lineage.manifest import describe_parent
from offline_align.stages.job import Job
from offline_align.stages.output import show

# Files that judges write into the run folder, besides the report.
RECORDS = ("verdicts.jsonl", "rating.html", "ratings*.jsonl")


def run(job: Job[EvaluateRun]) -> int:
    """Write report.json, report.md and report.html into `run.dir`, print the result and return 0.

    All ranks run reward models and policies; rank 0 does everything else. Raises ConfigError,
    DataError, StorageError, and StoppedEarly if the judge has not finished.
    """
    config = job.config
    files = input_paths(config.data.input, "data.input") if config.data.input is not None else []
    if files:
        choose_baseline(name_columns(files), config.evaluate.baseline)
    judge = build_judge(config) if config.judges else None
    second = second_reward_model(config) if judge else None
    if config.dry_run:
        show(Text(_plan(job, files, judge)))
        return 0
    is_main = int(os.environ.get("RANK", "0")) == 0
    if not is_main and not isinstance(judge, RewardModelJudge) and second is None:
        return 0
    if job.is_finished():
        return 0
    # If another job has just finished this run, repeat it: the other ranks have already started.
    with job.held() if is_main else contextlib.nullcontext():
        material = _read(config, files, job.bad_rows(writes=is_main))
        scored = _score(config, judge, second, material, is_main) if judge else _Scored()
        if is_main:
            _report(job, material, scored, judge)
    return 0


def problems(job: Job[EvaluateRun]) -> list[str]:
    """Return the problems of the reward models that judge."""
    config = job.config
    if config.evaluate.runs is not None and not config.judges:
        return []
    second = config.judge.second_model
    found = _reward_model("judge.second_model", second, config)[0] if second is not None else []
    if config.judge.kind is not JudgeKind.reward_model:
        return found
    if config.judge.model is None:
        return ["judge.model is not set: give the run folder of a reward model", *found]
    wrong, template = _reward_model("judge.model", config.judge.model, config)
    given = config.data.named_template
    if template is not None and given is not None and given is not template:
        wrong = [f"data.template={given}: judge.model was trained with {template}; leave data.template unset"]
    return wrong + found


def _reward_model(key: str, source: str, config: EvaluateRun) -> tuple[list[str], Template | None]:
    """Return the problems of the reward model that `key` names, and its template."""
    try:
        return [], open_reward_model(source, key, config.data.template).description.template
    except ConfigError as error:
        return error.problems, None


@dataclass(frozen=True, slots=True)
class _Material:
    """The material to judge: answers of the methods, pairs judged by people, or both."""

    comparison: Comparison | None
    pairs: list[JudgedPair]


@dataclass(frozen=True, slots=True)
class _Scored:
    judgement: Judgement | None = None
    verdicts: Verdicts | None = None
    second: Floats | None = None
    """Scores of the second reward model, in the shape of the judge's."""
    divergence: Divergence | None = None


def _read(config: EvaluateRun, files: list[Path], bad_rows: BadRows) -> _Material:
    comparison = load_comparison(files, bad_rows) if files else None
    named = config.judge.calibration
    pairs = read_judged_pairs(input_paths(named, "judge.calibration"), bad_rows) if named is not None else []
    return _Material(comparison, pairs)


@effort.part("judging")
def _score(
    config: EvaluateRun, judge: Judge, second: RewardModelJudge | None, material: _Material, is_main: bool
) -> _Scored:
    """Score answers and pairs in one call, so that a model is loaded once.

    Only reward models use all ranks.
    """
    answers = material.comparison.samples() if material.comparison else []
    asked = [*answers, *both_orders(material.pairs)]
    takes_part = is_main or isinstance(judge, RewardModelJudge)
    scores = judge.score(asked, in_order_from=len(answers)) if takes_part else [math.nan] * len(asked)
    judgement = verdicts = others = divergence = None
    if comparison := material.comparison:
        judgement = Judgement(judge.name, _table(scores[: len(answers)], comparison), judge.describe())
        others = _table(second.score(answers), comparison) if second else None
        # Policies are large, so they are run only if the ranks are running a reward model anyway.
        on_ranks = isinstance(judge, RewardModelJudge) or second is not None
        divergence = measure_divergence(comparison, config) if on_ranks and config.evaluate.divergence else None
    if material.pairs:
        verdicts = Verdicts.from_scores(material.pairs, scores[len(answers) :])
    return _Scored(judgement, verdicts, others, divergence)


def _table(scores: Sequence[float], comparison: Comparison) -> Floats:
    return np.array(scores, dtype=np.float64).reshape(comparison.shape)


def _report(job: Job[EvaluateRun], material: _Material, scored: _Scored, judge: Judge | None) -> None:
    job.start_folder()
    report = _assemble(job, material, scored, judge)
    pictures = report.pictures()
    outputs = write_report(job.run_dir, report, pictures)
    write_board(job.run_dir, report, pictures, (job.run_dir / "report.md").read_text(encoding="utf-8"))
    records = [path for pattern in RECORDS for path in sorted(job.run_dir.glob(pattern))]
    extra = {"judge": report.results["judge"], "methods": report.results.get("methods", [])}
    job.finish([*outputs, *records], extra)
    _print(report, outputs[-1])


def _assemble(job: Job[EvaluateRun], material: _Material, scored: _Scored, judge: Judge | None) -> Report:
    config = job.config
    compared = _compared(config, material, scored)
    named = job.shown_runs
    runs = runs_behind(compared, named)
    results = build_results(compared, config.evaluate, config.run.seed) if compared else _bare_results(config, judge)
    others = other_verdicts(compared, named) if compared else []
    sections = report_sections(_evidence(config, compared, scored, judge, runs if named else None, others))
    return Report(results, compared, sections, runs, None if compared else samples_of_runs(runs))


def _compared(config: EvaluateRun, material: _Material, scored: _Scored) -> Compared | None:
    if material.comparison is None or scored.judgement is None:
        return None
    # True quality is shown beside the scores of another judge; here it is the scores.
    quality = None if config.judge.kind is JudgeKind.ground_truth else _true_quality(material.comparison)
    return Compared(material.comparison, scored.judgement, quality)


def _bare_results(config: EvaluateRun, judge: Judge | None) -> dict[str, Any]:
    """Return the results of a report without a comparison."""
    return {
        "format": FORMAT,
        "judge": {"name": judge.name, **judge.describe()} if judge else None,
        "group_by": config.evaluate.group_by,
        "confidence": config.evaluate.confidence,
        "bootstrap_samples": config.evaluate.bootstrap_samples,
        "seed": config.run.seed,
    }


def _evidence(
    config: EvaluateRun,
    compared: Compared | None,
    scored: _Scored,
    judge: Judge | None,
    runs: Sequence[Ancestor] | None,
    others: Sequence[Verdict],
) -> Evidence:
    scorer = judge.checkpoint if compared is not None and isinstance(judge, RewardModelJudge) else None
    return Evidence(
        settings=config.evaluate,
        seed=config.run.seed,
        compared=compared,
        judge=judge.describe() if judge else None,
        judge_content=describe_parent(scorer).content_sha256 if scorer else None,
        second_scores=scored.second,
        second_model=config.judge.second_model,
        divergence=scored.divergence,
        others=others,
        verdicts=scored.verdicts,
        runs=runs,
    )


def _true_quality(comparison: Comparison) -> Floats | None:
    """Return the true quality of all answers, or None if a prompt is not from the demo corpus."""
    if not all(is_demo_prompt(prompt.prompt) for prompt in comparison.prompts):
        return None
    scores = GroundTruthJudge().score(comparison.samples())
    return _table(scores, comparison)


def _plan(job: Job[EvaluateRun], files: list[Path], judge: Judge | None) -> str:
    config = job.config
    lines = [f"evaluate with {judge.name if judge else 'no judge'}, into {config.run.dir}"]
    lines += [f"  {column.name}: {column.path}" for column in name_columns(files)]
    if config.judge.calibration is not None:
        lines.append(f"  checked on the pairs of {config.judge.calibration}")
    lines += [f"  shows {run_dir}" for run_dir in job.shown_runs]
    return "\n".join(lines)


def _print(report: Report, page: Path) -> None:
    if report.compared:
        show(_as_rich(overall_table(report.results)), Text(headline(report.results, report.sections)))
    findings = [f"{section.title} {finding}" for section in report.sections for finding in section.findings]
    show(*map(Text, [*findings, f"report: {page}"]))


def _as_rich(table: Table) -> RichTable:
    shown = RichTable(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(table.header):
        width = max(len(row[k]) for row in table.rows)
        shown.add_column(Text(name), justify="right" if k else "left", min_width=width)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown
