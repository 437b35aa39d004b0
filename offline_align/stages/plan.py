"""`plan`: what FA keeps, RWR weighs and CA writes, and the cost of each. No GPU, no model.

Sizes are tokens where a tokenizer is known: that of `model.tokenizer`, or that of the reward model which
the labelled file's manifest names. Otherwise they are characters, and the table says so.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from itertools import batched
from pathlib import Path

from omegaconf import MISSING

from offline_align import lineage
from offline_align.config.runs import PlanRun
from offline_align.config.sections import InputDataSection, Template
from offline_align.convert.describe import describe, tokenizer_of
from offline_align.data.records import BadRows, LabelledSample, input_paths, read_rows
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError
from offline_align.methods import ca, checked
from offline_align.methods.planner import Settings, Sizes, plan
from offline_align.model.description import find_model
from offline_align.stages import common
from offline_align.stages.origin import tokenizer_path
from offline_align.stages.output import show
from offline_align.stages.plan_table import tables

PLAN_FILE = "plan.json"
ROWS_PER_BATCH = 512

logger = logging.getLogger(__name__)


def run(config: PlanRun, explicit: frozenset[str]) -> int:
    """Print the plan, and write `plan.json` where `run.dir` is set; return 0.

    Raises ConfigError for settings that cannot work, DataError for unusable rows.
    """
    paths = input_paths(config.data.input, "data.input")
    settings = _settings(config)
    run_dir = None if config.run.dir in (MISSING, None) or config.dry_run else Path(config.run.dir)
    key = common.key_of("plan", config)
    if run_dir is None or common.is_finished("plan", config, key):
        _show(config, settings, paths, None, key)
        return 0
    with common.only_job("plan", config, key) as to_do:
        _show(config, settings, paths, run_dir if to_do else None, key)
    return 0


def _show(config: PlanRun, settings: Settings, paths: Sequence[Path], run_dir: Path | None, key: str) -> None:
    """Print the plan, and write it into `run_dir` unless that is None."""
    if run_dir is not None:
        common.start_folder(config)
    bad_rows = BadRows(config.data.on_bad_row, run_dir / "quarantine.jsonl" if run_dir else None)
    rows = checked(read_rows(paths, LabelledSample, bad_rows))
    renderer = _renderer(config, paths)
    sizes = _token_sizes(rows, renderer, config.data.max_length) if renderer else _character_sizes(rows)
    made = plan(rows, sizes, settings)
    warnings = _unstable(renderer, rows, settings)
    show(*tables(made, warnings))
    if run_dir is not None:
        extra = {"warnings": warnings, "skipped_rows": dict(bad_rows.counts)}
        text = json.dumps(asdict(made) | extra, indent=2, ensure_ascii=False)
        lineage.write_atomically(run_dir / PLAN_FILE, f"{text}\n".encode())
        outputs = [path for path in (run_dir / PLAN_FILE, run_dir / "quarantine.jsonl") if path.exists()]
        lineage.write_manifest(run_dir, "plan", key, paths, [], outputs, {"rows": made.rows})


def _settings(config: PlanRun) -> Settings:
    method = config.method
    ca.check_format(method.reward_format, method.reward_limit)
    return Settings(
        threshold=method.threshold,
        beta=method.beta,
        target_reward=method.target_reward,
        reward_format=method.reward_format,
        reward_limit=method.reward_limit,
        best_of=method.best_of,
    )


def _renderer(config: PlanRun, paths: Sequence[Path]) -> Renderer | None:
    """Return the renderer of `model.tokenizer`, or of a model that a labelled file came from, or None."""
    if config.model.tokenizer is not None:
        tokenizer = load_tokenizer(tokenizer_path(config.model.tokenizer))
        return Renderer(tokenizer, config.data.template or Template.paper, _day(config.data.template_date))
    return next(_renderers_behind(paths, config.data), None)


def _day(given: str | None) -> date | None:
    return date.fromisoformat(given) if given else None


def _renderers_behind(paths: Sequence[Path], data: InputDataSection) -> Iterator[Renderer]:
    """Yield those of the models that the manifests beside the files name, where they are still there."""
    for run_dir in dict.fromkeys(path.resolve().parent for path in paths):
        manifest = lineage.read_manifest(run_dir)
        for parent in manifest.parents if manifest else []:
            folder = run_dir / parent.path / (parent.part or "")
            try:
                model = find_model(folder)
                found = describe(model, data.template, data.template_date)
                yield replace(found, template=data.template or found.template).renderer(tokenizer_of(model))
            except ConfigError:
                logger.debug("%s: not a model", folder)


def _token_sizes(rows: Sequence[LabelledSample], renderer: Renderer, max_length: int) -> Sizes:
    """Return sizes in tokens, rows over `max_length` counted as cut to it."""
    lengths: list[int] = []
    targets: list[int] = []
    for batch in batched(rows, ROWS_PER_BATCH):
        spans = [renderer.spans(row.prompt, [row.response]) for row in batch]
        ids = renderer.encode([span for row in spans for span in row])
        tokens = [renderer.rows(pair)[0] for pair in batched(ids, 2)]
        targets += [min(max_length, len(target)) for _, target in tokens]
        lengths += [min(max_length, len(context)) for context, _ in tokens]
    both = [min(max_length, context + target) for context, target in zip(lengths, targets, strict=True)]
    return Sizes("tokens", both, targets, renderer.condition_tokens)


def _character_sizes(rows: Sequence[LabelledSample]) -> Sizes:
    responses = [len(row.response) for row in rows]
    prompts = [sum(len(message.content) for message in row.prompt) for row in rows]
    both = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return Sizes("characters", both, responses, len)


def _unstable(renderer: Renderer | None, rows: Sequence[LabelledSample], settings: Settings) -> list[str]:
    """Return what stands against CA with this tokenizer."""
    if renderer is None:
        return []
    rewards = [row.reward for row in rows] + [settings.target_reward]
    try:
        ca.check_stable(renderer, rewards, settings.reward_format, settings.reward_limit)
    except ConfigError as error:
        return error.problems
    return []
