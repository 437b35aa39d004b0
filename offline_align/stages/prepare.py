"""`prepare`: turn raw data sets, JSONL or the demo corpus into rows for the other stages."""

import json
import logging
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from offline_align import lineage
from offline_align.config.runs import PrepareRun
from offline_align.config.sections import LabelSection, OnBadRow
from offline_align.data.adapters.convert import convert
from offline_align.data.adapters.counts import KINDS, InputCounts
from offline_align.data.adapters.forms import FORMS, KNOWN
from offline_align.data.adapters.ratings import REWARD, VERDICTS
from offline_align.data.demo import MOST_PROMPTS, demo_prompts
from offline_align.data.jsonl import BadRows, write_jsonl
from offline_align.data.preparation import FILES, LABELLED, Preparation, prepare_rows, report, write_rows
from offline_align.data.sources import Source, held_out_files, input_sources, read_source
from offline_align.errors import DataError
from offline_align.label.results import labelled_rows, write_results
from offline_align.label.statistics import RewardStats, normalise
from offline_align.stages.job import Job
from offline_align.wording import counted

PROMPTS = "prompts.jsonl"
TOKENIZER = "tokenizer.model"
REPORT = "report.json"
logger = logging.getLogger(__name__)


def run(job: Job[PrepareRun]) -> int:
    """Write rows, report and manifest into `run.dir`; return 0.

    Raises ConfigError, DataError, StorageError.
    """
    console = Console(soft_wrap=True)
    sources = input_sources(job.config.data.input, "data.input")
    if held_out := held_out_files(job.config.data.input, sources):
        logger.warning("data.input takes %s too; name the files to leave them out", ", ".join(held_out))
    if job.config.dry_run:
        console.print(_plan(job.config, sources), highlight=False, markup=False)
        return 0
    summary: dict[str, int] = {}
    job.alone(lambda: summary.update(_write(job, sources)))
    for name, rows in summary.items():
        console.print(f"{name}: {counted(rows, 'row')}", highlight=False)
    return 0


def _write(job: Job[PrepareRun], sources: list[Source]) -> dict[str, int]:
    """Write the run folder, the manifest last, and return the number of rows of each file."""
    job.start_folder()
    summary, outputs, facts = _prepare(job, sources)
    job.finish(outputs, {"rows": summary, **facts})
    return summary


def _prepare(job: Job[PrepareRun], sources: list[Source]) -> tuple[dict[str, int], list[Path], dict[str, Any]]:
    """Write all outputs; return the number of rows of each file, the paths, and facts for the manifest."""
    config, run_dir, bad_rows = job.config, job.run_dir, job.bad_rows()
    result = prepare_rows(sources, config.prepare, config.run.seed, bad_rows)
    outputs = write_rows(result, run_dir)
    _warn_of_missing_rows(config, result, bad_rows)
    summary = {name: len(rows) for name, rows in result.files.items() if rows or name in FILES}
    facts: dict[str, Any] = {}
    if any(result.files[name] for name in LABELLED):
        stats, written = _write_labelled(result, run_dir)
        outputs += written
        facts = {"statistics": stats.as_json()}
    if any(source.is_demo for source in sources):
        rows = demo_prompts(config.prepare.demo_prompt_rows, config.run.seed)
        summary[PROMPTS] = write_jsonl(run_dir / PROMPTS, rows)
        outputs.append(run_dir / PROMPTS)
    if config.tokenizer.train:
        outputs.append(_train_tokenizer(config, result, run_dir))
    text = json.dumps(report(result, bad_rows), indent=2, ensure_ascii=False)
    lineage.write_atomically(run_dir / REPORT, f"{text}\n".encode())
    return summary, [*outputs, run_dir / REPORT], facts


def _write_labelled(result: Preparation, run_dir: Path) -> tuple[RewardStats, list[Path]]:
    """Write the labelled rows as `label` does; validation rows have the scale of the training rows.

    Raises DataError if all rated answers are validation rows.
    """
    train, valid = (result.files[name] for name in LABELLED)
    if not train:
        raise DataError(
            f"labelled.jsonl: all {len(valid)} rated answers are validation rows; lower prepare.valid_fraction"
        )
    stats, paths = write_results(run_dir, train, [row[REWARD] for row in train], LabelSection().histogram_bins)
    if valid:
        raw = [row[REWARD] for row in valid]
        paths.append(run_dir / LABELLED[1])
        write_jsonl(paths[-1], labelled_rows(valid, raw, normalise(raw, stats).tolist()))
    return stats, paths


def _warn_of_missing_rows(config: PrepareRun, result: Preparation, bad_rows: BadRows) -> None:
    """Warn of rows that were left out, and of an empty side of the split."""
    bad_rows.report(logger)
    dropped = sum((counts.dropped for counts in result.inputs), Counter[str]())
    if dropped:
        lost = f"{counted(dropped.total(), 'row')} {'is' if dropped.total() == 1 else 'are'} dropped"
        logger.warning("%s, see %s: %s", lost, REPORT, dict(dropped.most_common()))
    share = config.prepare.valid_fraction
    for kind in ("sft", "preferences"):
        sides = [f"{kind}_{part}.jsonl" for part in ("train", "valid")]
        rows = sum(len(result.files[name]) for name in sides)
        for name in sides if rows and share else []:
            if not result.files[name]:
                few = f"{counted(rows, 'row')} {'is' if rows == 1 else 'are'} too few"
                logger.warning("%s is empty: %s for prepare.valid_fraction=%s", name, few, share)


def _train_tokenizer(config: PrepareRun, result: Preparation, run_dir: Path) -> Path:
    from offline_align.data.sentencepiece_training import train_sentencepiece

    path = run_dir / TOKENIZER
    lineage.write_atomically(path, train_sentencepiece(result.training_texts(), config.tokenizer.vocab_size))
    return path


def problems(job: Job[PrepareRun]) -> list[str]:
    """Return the problems of settings whose bounds are known to the readers of data."""
    settings = job.config.prepare
    found = []
    if settings.format not in (None, *FORMS, *(form.older_name for form in KNOWN)):
        found.append(f"prepare.format={settings.format}: must be one of {', '.join(FORMS)}, or unset")
    if settings.demo_prompt_rows > MOST_PROMPTS:
        found.append(f"prepare.demo_prompt_rows={settings.demo_prompt_rows}: must be {MOST_PROMPTS} or less")
    readable = {name for form in KNOWN for name in form.reads} | {"id", "margin", "source", *VERDICTS}
    for name in settings.columns:
        if name not in readable:
            near = get_close_matches(name, readable, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(sorted(readable))}"
            found.append(f"prepare.columns.{name}: `prepare` reads no column of this name; {hint}")
    return found


def _first_row(source: Source, config: PrepareRun) -> str:
    """Return what the first row of a file is and becomes, or why it cannot be used."""
    bad_rows, counts = BadRows(OnBadRow.fail, None), InputCounts(source.name)
    try:
        made = list(convert(read_source(source, bad_rows, 1), config.prepare, bad_rows, counts))
    except DataError as error:
        return str(error).removeprefix(f"{source.path}:")
    form = ", ".join(counts.forms) or "nothing"
    kinds = ", ".join(counted(number, KINDS[kind]) for kind, number in Counter(c.kind for c in made).items())
    dropped = ", ".join(counts.dropped)
    return f"the first row has the form {form} and becomes {kinds or 'nothing'}{f' ({dropped})' if dropped else ''}"


def _plan(config: PrepareRun, sources: list[Source]) -> str:
    lines = [f"prepare into {config.run.dir}", "reads"]
    for source in sources:
        size = f", {source.path.stat().st_size:,} bytes: {_first_row(source, config)}" if source.path else ""
        lines.append(f"  {source.path or source.name}{size}")
    demo = [PROMPTS] if any(source.is_demo for source in sources) else []
    tokenizer = [TOKENIZER] if config.tokenizer.train else []
    rated = ["labelled.jsonl, labelled_valid.jsonl, reward_stats.json, reward_histogram.png: if answers are rated"]
    names = [*FILES, *([] if demo and len(sources) == 1 else rated), *demo, *tokenizer, REPORT]
    return "\n".join([*lines, "writes", *(f"  {name}" for name in names)])
