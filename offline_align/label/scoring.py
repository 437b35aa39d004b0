"""Score rows with a reward model; `model/passes.py` distributes the forward passes over the ranks."""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from offline_align.config.sections import ComputeSection, DataSection, ParallelSection, RunSection, TooLong
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.bins import SampleSource, shares_prompts
from offline_align.data.fate import reasons
from offline_align.data.records import Sample, TrainingRow
from offline_align.data.shown import show_sample
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedRows, tokenize_samples
from offline_align.distributed.setup import Ranks, session, uses_bf16
from offline_align.errors import DataError
from offline_align.lineage import effort
from offline_align.model.passes import Compute, computed_bins, plan_bins
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.model.heads import Policy, RewardModel

logger = logging.getLogger(__name__)


def score_samples(
    checkpoint: Path,
    samples: Sequence[Sample],
    run: RunSection,
    data: DataSection,
    parallel: ParallelSection,
    trainer: ComputeSection,
) -> list[float]:
    """Return the raw reward of every sample, in order; for `evaluate`. Starts its own session.

    A sample whose response alone is longer than `data.max_length` gets NaN, with a warning.
    """
    judge = open_model(checkpoint, template=data.template, template_date=data.template_date)
    with session(parallel, run) as ranks:
        model = load_reward_model(judge, parallel, ranks, uses_bf16(trainer.precision, ranks.device))
        renderer = judge.renderer()
        tokens = tokens_by_place([TrainingRow(s) for s in samples], renderer, data, run)
        if ranks.is_main:
            say_what_is_read(renderer, tokens)
        source = SampleSource(tokens, shares_prompts(trainer, parallel))
        bins = plan_bins(source, trainer.micro_batch_size * data.max_length)
        merged = {int(tokens.row_ids[row]): score for row, score in score_all(model, source, bins, ranks).items()}
        if len(merged) < len(samples):
            logger.warning("%s no score", counted(len(samples) - len(merged), "answer has", "answers have"))
        return [merged.get(i, math.nan) for i in range(len(samples))]


def tokens_by_place(
    rows: Sequence[TrainingRow], renderer: Renderer, data: DataSection, run: RunSection
) -> TokenizedRows:
    """Return the tokens of `rows`, with each row's index as its id.

    Sample ids need not be unique, but indices are, so they show which rows were left out.
    """
    cache = Path(data.cache_dir) if data.cache_dir else Path(run.dir) / "cache"
    placed = [replace(row, sample=replace(row.sample, id=str(k))) for k, row in enumerate(rows)]
    return tokenize_samples(placed, renderer, data, cache, empty_answers=True)


def say_what_is_read(renderer: Renderer, rows: TokenizedRows) -> None:
    """Log the template and the first row, decoded from the tokens that the reward model reads."""
    form = f"template {renderer.template}"
    if renderer.reading:
        form = f"a third-party reward model, {form}, ids and scored token as in transformers"
    if renderer.day:
        form += f", data.template_date={renderer.day}"
    shown = show_sample(rows, 0, renderer.tokenizer, form, "answer")
    logger.info("first row, as the reward model reads it:\n%s", shown)


def load_reward_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "RewardModel":
    """Return a reward model with its weights, ready to score, in the layout of `parallel`."""
    from offline_align.model.heads import RewardModel

    model = load_model(source, parallel, ranks, bf16)
    assert isinstance(model, RewardModel)
    return model


@effort.part("load")
def load_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "Policy | RewardModel":
    """Return a model with its weights, for forward passes only, in the layout of `parallel`."""
    # This imports megatron-core, which works only after `session` has prepared the process.
    from offline_align.model.build import build_model

    model = build_model(source.kind, source.model, parallel, ranks.device, bf16)
    source.load_into(model, ranks)
    model.eval()
    return model


def tokenized(
    samples: Sequence[Sample],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    share_prompts: bool = False,
    announced: bool = False,
) -> SampleSource:
    """Return the tokenised `samples`; if `announced` is set, log the first one.

    Raises DataError if a sample would be left out, because every row must get a score.
    """
    rows = tokenize_samples([TrainingRow(s) for s in samples], renderer, data, cache_dir, empty_answers=True)
    if len(rows) != len(samples):
        kept = set(rows.row_ids)
        lost = [s.id for s in samples if s.id not in kept]
        fix = "" if data.too_long is TooLong.truncate_prompt else " or set data.too_long=truncate_prompt"
        raise DataError(
            f"row {lost[0]}: cannot be scored ({reasons(rows.dropped)} of {counted(len(samples), 'row')}): "
            f"raise data.max_length={data.max_length}{fix}"
        )
    if announced:
        say_what_is_read(renderer, rows)
    return SampleSource(rows, share_prompts)


def score_all(model: "RewardModel", source: SampleSource, bins: Sequence[list[int]], ranks: Ranks) -> dict[int, float]:
    """Return {row: score} for all rows of `bins`. A collective: the ranks share the work, and all must call it."""
    own = dict(chain.from_iterable(score_bins(model, source, bins[ranks.dp_rank :: ranks.dp_size], ranks)))
    return {row: score for part in ranks.gather(own) for row, score in part.items()}


def score_bins(
    model: "RewardModel",
    source: SampleSource,
    bins: Sequence[list[int]],
    ranks: Ranks,
    stops: Callable[[], bool] = lambda: False,
) -> Generator[list[tuple[int, float]]]:
    """Yield a list of (row, score) for each bin, in order; see `computed_bins`."""
    compute, sequence_parallel = scores_of(model)
    for found in computed_bins(compute, source, bins, ranks, sequence_parallel, stops):
        yield [(row, score) for row, (score,) in found]


def scores_of(model: "RewardModel") -> tuple[Compute, bool]:
    """Return the function that scores the segments of a bin, and whether the model is sequence parallel."""
    return lambda batch: model(batch).float(), model.config.sequence_parallel
