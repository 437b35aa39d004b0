"""The rows that a dry run reads: how many, what would be refused, and the first one as the model sees it.

Nothing is written: tokens go into a temporary folder.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offline_align.config.runs import GenerateRun, LabelRun, TrainRun, section
from offline_align.config.sections import DataSection, MethodSection, OnBadRow
from offline_align.data.jsonl import HUB_PREFIX, count_lines, is_empty
from offline_align.data.records import BadRows, Prompt, Sample, input_paths, read_rows, read_rows_and_pairs, reject_rows
from offline_align.errors import ConfigError, DataError
from offline_align.stages.job import Job
from offline_align.stages.recipe import PairRecipe, RowRecipe, settings_alone

# Steps whose bins are packed, to show what a step takes.
_STEPS = 32


class NotedRows(BadRows):
    """Notes the message of every bad row instead of raising it."""

    def __init__(self, policy: OnBadRow) -> None:
        super().__init__(policy, None)
        self.messages: list[str] = []

    def reject(self, path: Path, line_no: int, reason: str, raw: str) -> None:
        """Count one row. Under `data.on_bad_row=fail`, note the message with which the run would end."""
        try:
            super().reject(path, line_no, reason, raw)
        except DataError as error:
            self.messages.append(str(error))
            self.counts[reason] += 1

    def report(self, log: logging.Logger) -> None:
        """Log nothing, because the plan lists the bad rows."""

    def check(self) -> None:
        """Raise DataError for the first row that would end the run."""
        if self.messages:
            more = f" (and {len(self.messages) - 1} more bad rows)" if len(self.messages) > 1 else ""
            raise DataError(self.messages[0] + more)


@dataclass(frozen=True)
class Step:
    """A training step, on average over some steps."""

    tokens: float
    bins: float
    """Micro-batches of a rank."""
    padding: float
    """Share of padding."""
    largest_bin: int
    """Tokens of the largest micro-batch."""


@dataclass
class PlannedRows:
    """The rows of one key."""

    lines: int
    """Rows in the files."""
    read: int
    """Rows that are read, good or bad."""
    kept: int = 0
    """Rows of these that the run would use."""
    tokens: int = 0
    """Tokens of the kept rows."""
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    first: str = ""
    """The first row as the model sees it."""
    step: Step | None = None
    fitted: Any = None
    """What the training rows determine, for the validation rows; None if they were not read."""
    bad: NotedRows = field(default_factory=lambda: NotedRows(OnBadRow.skip))
    error: DataError | ConfigError | None = None
    """Why the run would end; None if it would not."""

    @property
    def whole(self) -> bool:
        """Whether all rows were read."""
        return self.read >= self.lines

    @property
    def estimated(self) -> int:
        """The number of rows that the run would use, estimated if not all were read."""
        return self.kept if self.whole else round(self.lines * self.kept / max(self.read, 1))


@contextmanager
def _temporary_cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="offline-align-") as folder:
        yield Path(folder)


def _opened(paths: list[Path], data: DataSection) -> tuple[PlannedRows, int]:
    """Return the rows of `paths`, not yet read, and the number of lines of which one is read."""
    lines = count_lines(paths)
    every = 1 if data.dry_run_rows is None else max(1, -(-lines // max(data.dry_run_rows, 1)))
    read = lines if every == 1 else count_lines(paths, every)
    return PlannedRows(lines, read, bad=NotedRows(data.on_bad_row)), every


def readable_paths(config: TrainRun | LabelRun | GenerateRun, key: str) -> list[Path] | str:
    """Return the files of a key, or why a dry run does not read them."""
    named = config.named_files()[key]
    if named is None:
        return f"{key} is not set"
    if config.data.dry_run_rows == 0:
        return "data.dry_run_rows=0"
    paths = input_paths(named, key)
    hub = [path for path in paths if str(path).startswith(HUB_PREFIX)]
    if hub:
        return f"{hub[0]} is on the Hub, and a dry run loads nothing"
    missing = [path for path in paths if not path.is_file()]
    return f"{missing[0]} does not exist yet" if missing else paths


def training_rows(
    job: Job[TrainRun], which: str, paths: list[Path], data_ranks: int, fitted: Any = None
) -> PlannedRows:
    """Return the rows of `data.train` or `data.valid`, read as the training reads them.

    `fitted` is that of the training rows, for validation rows; None if these were not read.
    """
    from offline_align.data.bins import PairSource, SampleSource
    from offline_align.data.shown import first_row
    from offline_align.stages.training import recipe_of, tokenized, training_renderer

    recipe = recipe_of(job)
    form = recipe.train if which == "train" else recipe.valid
    data = job.config.data
    if isinstance(form, PairRecipe) and form.also is not None:
        # Pairs are made of all answers to a prompt, so a sample of the answers would miss most pairs.
        data = replace(data, dry_run_rows=None)
    found, every = _opened(paths, data)
    if which == "valid" and is_empty(paths):
        return found
    with _temporary_cache() as cache:
        try:
            renderer = training_renderer(job)
            if every > 1 and fitted is None and isinstance(form, RowRecipe):
                fitted = _fitted_to_all(job, paths, form)
            read = tokenized(job, paths, form, renderer, found.bad, cache, every, fitted)
        except (DataError, ConfigError) as error:
            found.error = error
            return found
        source, found.fitted = read.source, read.fitted
        rows = source.pairs.chosen if isinstance(source, PairSource) else None
        rows = source.rows if isinstance(source, SampleSource) else rows
        assert rows is not None
        found.kept, found.dropped = len(source), read.facts["dropped"]
        found.tokens, found.truncated = source.num_tokens(), rows.truncated
        found.first = first_row(source, renderer)
        if which == "train":
            found.step = _step(job.config, source, data_ranks)
    return found


def _fitted_to_all(job: Job[TrainRun], paths: list[Path], form: RowRecipe) -> Any:
    """Return what all rows of the files determine, so that those of a sample become what the training makes of them."""
    settings = section(job.config, MethodSection)
    if form.fit is settings_alone:
        return settings
    return form.fit(list(read_rows(paths, form.form, BadRows(OnBadRow.skip, None))), settings, job.config.run.seed)


def _step(config: TrainRun, source: Any, data_ranks: int) -> Step:
    import torch

    from offline_align.distributed.setup import Ranks
    from offline_align.stages.training import loader

    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    world = data_ranks * tensor * context
    first = Ranks(0, world, 0, data_ranks, 0, tensor, 0, context, torch.device("cpu"))
    steps = loader(config, source, first, config.trainer.max_steps)
    seen = [steps.step(number) for number in range(min(_STEPS, steps.total_steps))]
    bins = [batch.tokens.numel() for data in seen for batch in data.micro_batches]
    tokens, padding = (sum(getattr(data, name) for data in seen) for name in ("num_tokens", "num_padding"))
    return Step(tokens / len(seen), len(bins) / len(seen), padding / max(tokens + padding, 1), max(bins, default=0))


def label_rows(job: Job[LabelRun], paths: list[Path]) -> PlannedRows:
    """Return the rows that `label` would score."""
    from offline_align.data.shown import first_row
    from offline_align.label.rows import leave_out_unscorable, single_answers
    from offline_align.label.scoring import tokenized

    found, every = _opened(paths, job.config.data)
    with _temporary_cache() as cache:
        try:
            renderer, data = job.source.renderer(), job.config.data
            rows = list(read_rows_and_pairs(paths, Sample, found.bad, every))
            rows, left_out = leave_out_unscorable(rows, paths, renderer, data, cache, found.bad)
            source = tokenized(list(single_answers(rows)), renderer, data, cache)
        except (DataError, ConfigError) as error:
            found.error = error
            return found
        found.kept, found.tokens, found.truncated = len(rows), source.num_tokens(), source.rows.truncated
        found.dropped = dict(Counter(left_out.values()))
        found.first = first_row(source, renderer, "answer")
    return found


def prompt_rows(job: Job[GenerateRun], paths: list[Path], conditions: list[str]) -> PlannedRows:
    """Return the prompts that `generate` would answer."""
    from offline_align.data.shown import show_prompt
    from offline_align.generate.requests import build_requests

    found, every = _opened(paths, job.config.data)
    config, renderer = job.config, job.source.renderer()
    try:
        prompts = list(read_rows(paths, Prompt, found.bad, every))
        work = build_requests(
            prompts,
            renderer,
            conditions,
            config.data,
            config.generate,
            lambda refused: reject_rows(paths, Prompt, refused, found.bad),
        )
    except (DataError, ConfigError) as error:
        found.error = error
        return found
    first = work.requests[0]
    condition = renderer.condition_tokens(conditions[first.variant])
    found.dropped, found.truncated = work.dropped, work.truncated
    found.kept = len({request.row for request in work.requests})
    found.tokens = sum(len(request.context) for request in work.requests)
    found.first = show_prompt(prompts[first.row].id, first.context, condition, renderer)
    return found
