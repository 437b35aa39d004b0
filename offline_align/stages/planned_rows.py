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
from typing import Any, Literal

from offline_align.config.runs import GenerateRun, LabelRun, TrainRun, section
from offline_align.config.sections import DataSection, MethodSection, OnBadRow
from offline_align.data.jsonl import HUB_PREFIX, count_lines, is_empty
from offline_align.data.records import BadRows, Prompt, Sample, input_paths, read_rows, read_rows_and_pairs, reject_rows
from offline_align.data.sampling import epoch_in_words
from offline_align.errors import ConfigError, DataError
from offline_align.stages.job import Job
from offline_align.stages.recipe import PairRecipe, RowRecipe, settings_alone
from offline_align.stages.row_choice import RowChoice, row_choice

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
    """Rows in the files, or those that `data.sample` chooses."""
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
    sources: str = ""
    """The numbers of rows by source, if there is anything to say about them."""
    epoch: str = ""
    """The rows of an epoch by source, if sources are mixed."""
    without_share: str = ""
    """A warning about sources that take no part, if there are any."""
    epoch_rows: int | None = None
    """Rows of an epoch, if sources are mixed."""
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
        """The number of rows of an epoch, estimated if not all were read."""
        size = self.kept if self.epoch_rows is None else self.epoch_rows
        return size if self.whole else round(self.lines * size / max(self.read, 1))


@contextmanager
def _temporary_cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="offline-align-") as folder:
        yield Path(folder)


def _opened(paths: list[Path], data: DataSection, choice: RowChoice | None = None) -> tuple[PlannedRows, int]:
    """Return the rows of `paths`, not yet read, and the number of rows of which one is used.

    These are the rows of a sample, if `choice` takes one.
    """
    lines = count_lines(paths)
    rows = lines if choice is None else choice.most(lines)
    every = 1 if data.dry_run_rows is None else max(1, -(-rows // max(data.dry_run_rows, 1)))
    if choice is not None:
        choice.every = every
    read = count_lines(paths, every) if every > 1 and (choice is None or choice.every_line > 1) else -(-rows // every)
    return PlannedRows(rows, read, bad=NotedRows(data.on_bad_row)), every


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
    job: Job[TrainRun], which: Literal["train", "valid"], paths: list[Path], data_ranks: int, fitted: Any = None
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
    choice = row_choice(job.config, which)
    found, _ = _opened(paths, data, choice)
    if which == "valid" and is_empty(paths):
        return found
    with _temporary_cache() as cache:
        try:
            renderer = training_renderer(job)
            if choice.every > 1 and fitted is None and isinstance(form, RowRecipe):
                fitted = _fitted_to_all(job, paths, form)
            read = tokenized(job, paths, form, renderer, found.bad, cache, choice, fitted)
        except (DataError, ConfigError) as error:
            found.error = error
            return found
        source, found.fitted = read.source, read.fitted
        rows = source.pairs.chosen if isinstance(source, PairSource) else None
        rows = source.rows if isinstance(source, SampleSource) else rows
        assert rows is not None
        found.kept, found.dropped, found.sources = len(source), read.facts["dropped"], choice.in_words()
        found.epoch_rows = source.epoch_rows
        if choice.weights:
            found.without_share = choice.without_share()
            found.epoch = ("about " if choice.every > 1 else "") + epoch_in_words(read.facts["sources"])
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
    rows = row_choice(job.config, "train").of(list(read_rows(paths, form.form, BadRows(OnBadRow.skip, None))))
    return form.fit(rows, settings, job.config.run.seed)


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

    choice = RowChoice(job.config.data, job.config.run.seed)
    found, _ = _opened(paths, job.config.data, choice)
    with _temporary_cache() as cache:
        try:
            renderer, data = job.source.renderer(), job.config.data
            rows = choice.of(list(read_rows_and_pairs(paths, Sample, found.bad, choice.every_line)))
            rows, left_out = leave_out_unscorable(rows, paths, renderer, data, cache, found.bad)
            source = tokenized(list(single_answers(rows)), renderer, data, cache)
        except (DataError, ConfigError) as error:
            found.error = error
            return found
        found.kept, found.tokens, found.truncated = len(rows), source.num_tokens(), source.rows.truncated
        found.dropped, found.sources = dict(Counter(left_out.values())), choice.in_words()
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
