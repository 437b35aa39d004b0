"""`prepare`: raw data sets, any JSONL or the demo corpus become the rows that the other stages read."""

import json
import logging
from collections import Counter
from pathlib import Path

from rich.console import Console

from offline_align import lineage
from offline_align.config.compose import to_mapping
from offline_align.config.runs import PrepareRun
from offline_align.data.adapters.convert import FORMS
from offline_align.data.demo import MOST_PROMPTS, demo_prompts
from offline_align.data.jsonl import BadRows, write_jsonl
from offline_align.data.preparation import FILES, Preparation, prepare_rows, report, write_rows
from offline_align.data.sources import Source, input_sources
from offline_align.errors import ConfigError
from offline_align.stages import common

STAGE = "prepare"
PROMPTS = "prompts.jsonl"
TOKENIZER = "tokenizer.model"
REPORT = "report.json"
QUARANTINE = "quarantine.jsonl"
logger = logging.getLogger(__name__)


def run(config: PrepareRun, explicit: frozenset[str]) -> int:
    """Write rows, report and manifest into `run.dir` and return 0; ConfigError, DataError, StorageError."""
    console = Console(soft_wrap=True)
    sources = _checked_sources(config)
    if config.dry_run:
        console.print(_plan(config, sources), highlight=False, markup=False)
        return 0
    run_dir = Path(config.run.dir)
    inputs = [source.path for source in sources if source.path]
    key = lineage.content_key(STAGE, to_mapping(config), inputs, [])
    if lineage.completed(run_dir, STAGE, key):
        console.print(f"{run_dir} is complete", highlight=False, markup=False)
        return 0
    with common.only_job(STAGE, config, key) as to_do:
        summary = _write(config, sources, run_dir, key) if to_do else {}
    console.print("\n".join(f"{name}: {rows:,} rows" for name, rows in summary.items()), highlight=False)
    return 0


def _write(config: PrepareRun, sources: list[Source], run_dir: Path, key: str) -> dict[str, int]:
    """Write the whole run folder, the manifest last, and return the rows of each file."""
    lineage.write_config(run_dir, to_mapping(config))
    summary, outputs = _prepare(config, sources, run_dir)
    inputs = [source.path for source in sources if source.path]
    lineage.write_manifest(run_dir, STAGE, key, inputs, [], outputs, {"rows": summary})
    return summary


def _prepare(config: PrepareRun, sources: list[Source], run_dir: Path) -> tuple[dict[str, int], list[Path]]:
    """Write all outputs and return the rows of each file, and the paths."""
    quarantine = run_dir / QUARANTINE
    quarantine.unlink(missing_ok=True)
    bad_rows = BadRows(config.data.on_bad_row, quarantine)
    result = prepare_rows(sources, config.prepare, config.run.seed, bad_rows)
    outputs = write_rows(result, run_dir)
    _say_what_is_missing(config, result, bad_rows)
    summary = {name: len(result.files[name]) for name in FILES}
    if any(source.is_demo for source in sources):
        rows = demo_prompts(config.prepare.demo_prompt_rows, config.run.seed)
        summary[PROMPTS] = write_jsonl(run_dir / PROMPTS, rows)
        outputs.append(run_dir / PROMPTS)
    if config.tokenizer.train:
        outputs.append(_train_tokenizer(config, result, run_dir))
    text = json.dumps(report(result, bad_rows), indent=2, ensure_ascii=False)
    lineage.write_atomically(run_dir / REPORT, f"{text}\n".encode())
    outputs += [path for path in (run_dir / REPORT, quarantine) if path.exists()]
    return summary, outputs


def _say_what_is_missing(config: PrepareRun, result: Preparation, bad_rows: BadRows) -> None:
    """Warn of rows that were left out, and of a side of the split that got none."""
    bad_rows.report(logger)
    dropped = sum((counts.dropped for counts in result.inputs), Counter[str]())
    if dropped:
        logger.warning("%d rows are dropped, see %s: %s", dropped.total(), REPORT, dict(dropped.most_common()))
    share = config.prepare.valid_fraction
    for kind in ("sft", "preferences"):
        sides = [f"{kind}_{part}.jsonl" for part in ("train", "valid")]
        rows = sum(len(result.files[name]) for name in sides)
        for name in sides if rows and share else []:
            if not result.files[name]:
                logger.warning("%s has no row: %d are few for prepare.valid_fraction=%s", name, rows, share)


def _train_tokenizer(config: PrepareRun, result: Preparation, run_dir: Path) -> Path:
    from offline_align.data.sentencepiece_training import train_sentencepiece

    path = run_dir / TOKENIZER
    lineage.write_atomically(path, train_sentencepiece(result.training_texts(), config.tokenizer.vocab_size))
    return path


def _checked_sources(config: PrepareRun) -> list[Source]:
    """Return the inputs; ConfigError with all that is wrong with the settings."""
    problems = _problems(config)
    sources: list[Source] = []
    try:
        sources = input_sources(config.data.input, "data.input")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return sources


def _problems(config: PrepareRun) -> list[str]:
    settings = config.prepare
    problems = []
    if settings.format not in (None, *FORMS):
        problems.append(f"prepare.format={settings.format}: must be one of {', '.join(FORMS)}, or unset")
    if not 0 <= settings.valid_fraction < 1:
        problems.append(f"prepare.valid_fraction={settings.valid_fraction}: must be at least 0 and below 1")
    if settings.max_rows is not None and settings.max_rows < 1:
        problems.append(f"prepare.max_rows={settings.max_rows}: must be 1 or more, or unset")
    if not 0 <= settings.demo_prompt_rows <= MOST_PROMPTS:
        problems.append(f"prepare.demo_prompt_rows={settings.demo_prompt_rows}: must be 0 to {MOST_PROMPTS}")
    for name in ("demo_sft_rows", "demo_preference_rows"):
        rows = {
            "demo_sft_rows": settings.demo_sft_rows,
            "demo_preference_rows": settings.demo_preference_rows,
        }
        if rows[name] < 0:
            problems.append(f"prepare.{name}={rows[name]}: must be 0 or more")
    return problems


def _plan(config: PrepareRun, sources: list[Source]) -> str:
    lines = [f"prepare into {config.run.dir}", "reads"]
    for source in sources:
        size = f", {source.path.stat().st_size:,} bytes" if source.path else ""
        lines.append(f"  {source.path or source.name}{size}")
    demo = [PROMPTS] if any(source.is_demo for source in sources) else []
    tokenizer = [TOKENIZER] if config.tokenizer.train else []
    return "\n".join([*lines, "writes", *(f"  {name}" for name in [*FILES, *demo, *tokenizer, REPORT])])
