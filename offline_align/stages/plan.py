"""`plan`: what FA keeps, RWR weighs, CA writes and DPO pairs, and the cost of each. No GPU, no model.

Sizes are in tokens if a tokenizer is known: `model.tokenizer`, or that of the reward model in the
manifest of the labelled file. Otherwise they are in characters, and the table says so.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from itertools import batched
from pathlib import Path

from offline_align import lineage
from offline_align.config.runs import PlanMethodSection, PlanRun
from offline_align.config.sections import DataSection, InputDataSection
from offline_align.convert.source import open_model
from offline_align.convert.template_choice import automatic
from offline_align.data.condition import check_format, check_quantile_format
from offline_align.data.fate import reasons, say_what_fits
from offline_align.data.records import LabelledSample, read_rows
from offline_align.data.template import Renderer
from offline_align.data.tokenize import left_out
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError
from offline_align.methods import ca, checked, conditions
from offline_align.methods.planner import Sizes, plan
from offline_align.stages.job import Job
from offline_align.stages.origin import tokenizer_path
from offline_align.stages.output import show
from offline_align.stages.plan_table import tables
from offline_align.stages.row_choice import RowChoice
from offline_align.wording import counted

PLAN_FILE = "plan.json"
ROWS_PER_BATCH = 512

logger = logging.getLogger(__name__)


def run(job: Job[PlanRun]) -> int:
    """Print the plan, and write `plan.json` if `run.dir` is set; return 0.

    Raises ConfigError for settings that cannot work, DataError for unusable rows.
    """
    settings = _settings(job.config)
    if not job.has_run_dir or job.config.dry_run or job.is_finished():
        _show(job, settings, writes=False)
        return 0
    with job.held() as to_do:
        _show(job, settings, writes=to_do)
    return 0


def _show(job: Job[PlanRun], settings: PlanMethodSection, writes: bool) -> None:
    """Print the plan; with `writes`, also write it into the run folder."""
    if writes:
        job.start_folder()
    paths, config = job.inputs, job.config
    bad_rows = job.bad_rows(writes)
    choice = RowChoice(config.data, config.run.seed)
    rows = choice.of(checked(read_rows(paths, LabelledSample, bad_rows)))
    renderer = _renderer(config, paths)
    out: Counter[str] = Counter()
    if renderer:
        rows, sizes, out = _token_sizes(rows, renderer, config.data)
    else:
        sizes = _character_sizes(rows)
    made = plan(rows, sizes, settings, config.run.seed)
    warnings = [*_left_out(out, config.data), *_unstable(renderer, rows, settings, config.run.seed)]
    show(*tables(made, warnings, choice.in_words()))
    if writes:
        extra = {"warnings": warnings, "skipped_rows": dict(bad_rows.counts), "left_out": dict(out)}
        extra |= {"sources": choice.counts}
        text = json.dumps(asdict(made) | extra, indent=2, ensure_ascii=False)
        lineage.write_atomically(job.run_dir / PLAN_FILE, f"{text}\n".encode())
        job.finish([job.run_dir / PLAN_FILE], {"rows": made.rows, "sources": choice.counts})


def _settings(config: PlanRun) -> PlanMethodSection:
    method = config.method
    check_format(method.reward_format, method.reward_limit)
    check_quantile_format(method.quantile_format)
    return method


def _renderer(config: PlanRun, paths: Sequence[Path]) -> Renderer | None:
    """Return the renderer of `model.tokenizer` or of a model behind a labelled file, or None."""
    if config.model.tokenizer is not None:
        tokenizer = load_tokenizer(tokenizer_path(config.model.tokenizer))
        usual = automatic(tokenizer, config.model.tokenizer, trains=True).template
        return Renderer(tokenizer, config.data.named_template or usual, _day(config.data.template_date))
    return next(_renderers_behind(paths, config.data), None)


def _day(given: str | None) -> date | None:
    return date.fromisoformat(given) if given else None


def _renderers_behind(paths: Sequence[Path], data: InputDataSection) -> Iterator[Renderer]:
    """Yield the renderers of the models in the manifests beside the files, if they still exist."""
    for run_dir in dict.fromkeys(path.resolve().parent for path in paths):
        manifest = lineage.read_manifest(run_dir)
        for parent in manifest.parents if manifest else []:
            folder = run_dir / parent.path / (parent.part or "")
            try:
                found = open_model(folder, template=data.template, template_date=data.template_date)
                template = data.named_template or found.description.template
                yield replace(found.description, template=template).renderer(found.tokenizer)
            except ConfigError:
                logger.debug("%s: not a model", folder)


def _token_sizes(
    rows: Sequence[LabelledSample], renderer: Renderer, data: DataSection
) -> tuple[list[LabelledSample], Sizes, Counter[str]]:
    """Return the rows that training keeps, their sizes, and the number of others by reason.

    Rows longer than `data.max_length` count with that length. Raises DataError if no row is left.
    """
    kept: list[LabelledSample] = []
    lengths: list[int] = []
    targets: list[int] = []
    out: Counter[str] = Counter()
    for batch in batched(rows, ROWS_PER_BATCH):
        spans = [renderer.spans(row.prompt, [row.response]) for row in batch]
        ids = renderer.encode([span for row in spans for span in row])
        for row, pair in zip(batch, batched(ids, 2), strict=True):
            ((context, target),) = renderer.rows(pair)
            if reason := left_out(len(context), len(target), renderer, data):
                out[reason] += 1
                continue
            kept.append(row)
            targets.append(len(target))
            lengths.append(min(data.max_length, len(context) + len(target)))
    if not kept:
        say_what_fits(logger, len(rows), 0, out, data)
    return kept, Sizes("tokens", lengths, targets, renderer.condition_tokens), out


def _left_out(out: Counter[str], data: DataSection) -> list[str]:
    """Return the warning about rows that the plan does not count, if there are any."""
    if not out:
        return []
    rows = f"{counted(out.total(), 'row is', 'rows are')} left out, as training does"
    return [f"{rows}: {reasons(out)}; see data.max_length={data.max_length}"]


def _character_sizes(rows: Sequence[LabelledSample]) -> Sizes:
    responses = [len(row.response) for row in rows]
    prompts = [sum(len(message.content) for message in row.prompt) for row in rows]
    both = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return Sizes("characters", both, responses, len)


def _unstable(
    renderer: Renderer | None, rows: Sequence[LabelledSample], settings: PlanMethodSection, seed: int
) -> list[str]:
    """Return the reasons why CA does not work with this tokenizer."""
    if renderer is None:
        return []
    fitted = conditions.fit(rows, settings, seed)
    numbers = [number for row in rows for number in fitted.numbers(row)]
    try:
        ca.check_stable(renderer, fitted.condition, [*numbers, fitted.condition.target])
    except ConfigError as error:
        return error.problems
    return []
