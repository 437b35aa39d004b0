"""Score many rows with a reward model, packed and data parallel.

The assignment of rows to bins is a pure function of the rows. It depends neither on the number of
ranks nor on the progress of earlier attempts, so a row's score is the same to the bit in every run
on the same kind of machine.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offline_align.config.sections import ComputeSection, DataSection, ParallelSection, RunSection, TooLong
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.batch import PackedBatch
from offline_align.data.bins import SampleSource, shares_prompts
from offline_align.data.context import share_of_context
from offline_align.data.pack import pack, padding_multiple
from offline_align.data.prefetch import prefetch
from offline_align.data.records import Sample, TrainingRow
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedRows, reasons, tokenize_samples
from offline_align.distributed.setup import Ranks, session, uses_bf16
from offline_align.errors import DataError
from offline_align.lineage import effort

if TYPE_CHECKING:
    from offline_align.model.heads import Policy, RewardModel

logger = logging.getLogger(__name__)

# Rows that are packed together: enough to fill the bins, few enough for steady progress.
_WINDOW_ROWS = 1024


def score_samples(
    checkpoint: Path,
    samples: Sequence[Sample],
    run: RunSection,
    data: DataSection,
    parallel: ParallelSection,
    trainer: ComputeSection,
) -> list[float]:
    """Return the raw reward of every sample, in order, from a session of its own (for evaluation).

    A sample whose response alone is longer than `data.max_length` gets NaN, with a warning.
    """
    judge = open_model(checkpoint, template=data.template, template_date=data.template_date)
    with session(parallel, run) as ranks:
        model = load_reward_model(judge, parallel, ranks, uses_bf16(trainer.precision, ranks.device))
        tokens = tokens_by_place([TrainingRow(s) for s in samples], judge.renderer(), data, run)
        source = SampleSource(tokens, shares_prompts(trainer, parallel))
        bins = plan_bins(source, trainer.micro_batch_size * data.max_length)
        merged = {int(tokens.row_ids[row]): score for row, score in score_all(model, source, bins, ranks).items()}
        if len(merged) < len(samples):
            missing = len(samples) - len(merged)
            logger.warning("%d of %d answers have no score: %s", missing, len(samples), reasons(tokens.dropped))
        return [merged.get(i, math.nan) for i in range(len(samples))]


def tokens_by_place(
    rows: Sequence[TrainingRow], renderer: Renderer, data: DataSection, run: RunSection
) -> TokenizedRows:
    """Return the tokens of `rows`, with each row's index as its id.

    Sample ids need not be unique. Indices are, and they show which rows were left out.
    """
    cache = Path(data.cache_dir) if data.cache_dir else Path(run.dir) / "cache"
    placed = [replace(row, sample=replace(row.sample, id=str(k))) for k, row in enumerate(rows)]
    tokens = tokenize_samples(placed, renderer, data, cache, empty_answers=True)
    say_what_is_read(renderer, tokens)
    return tokens


def say_what_is_read(renderer: Renderer, rows: TokenizedRows) -> None:
    """Log how the reward model reads rows, with the first row as the model sees it."""
    first = rows.ids[: rows.offsets[1]].tolist()
    form = f"data.template={renderer.template}"
    if renderer.reading:
        form = f"a third-party reward model, {form}, ids and scored token as in transformers"
    if renderer.day:
        form += f", data.template_date={renderer.day}"
    logger.info("first row, as the reward model reads it (%s): %r", form, renderer.tokenizer.shown(first))


def load_reward_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "RewardModel":
    """Return a reward model that is ready to score, at any parallel layout."""
    from offline_align.model.heads import RewardModel

    model = load_model(source, parallel, ranks, bf16)
    assert isinstance(model, RewardModel)
    return model


@effort.part("load")
def load_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "Policy | RewardModel":
    """Return a model for forward passes only, at any parallel layout."""
    # Import megatron-core only after the session has prepared this process for it.
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
    """Return the tokens of all `samples`; log the first one if `announced` is set.

    Raises DataError if a sample would be left out, because every row must get a score.
    """
    rows = tokenize_samples([TrainingRow(s) for s in samples], renderer, data, cache_dir, empty_answers=True)
    if len(rows) != len(samples):
        kept = set(rows.row_ids)
        lost = [s.id for s in samples if s.id not in kept]
        fix = "" if data.too_long is TooLong.truncate_prompt else " or set data.too_long=truncate_prompt"
        raise DataError(
            f"row {lost[0]}: cannot be scored ({reasons(rows.dropped)} of {len(samples)} rows): "
            f"raise data.max_length={data.max_length}{fix}"
        )
    if announced:
        say_what_is_read(renderer, rows)
    return SampleSource(rows, share_prompts)


def plan_bins(source: SampleSource, capacity: int) -> list[list[int]]:
    """Return the bins of rows that are scored together, each of at most `capacity` tokens.

    A bin takes rows from one window of the input only. If the source shares prompts, answers to one
    prompt are adjacent in a bin. A row longer than `capacity` raises the limit for its window.
    """
    bins: list[list[int]] = []
    for first in range(0, len(source), _WINDOW_ROWS):
        groups = source.groups(range(first, min(first + _WINDOW_ROWS, len(source))), capacity)
        lengths = [group.tokens for group in groups]
        packed = pack(lengths, max(capacity, *lengths))
        bins += [[row for i in b for row in groups[i].rows] for b in packed if b]
    return bins


def score_all(model: "RewardModel", source: SampleSource, bins: Sequence[list[int]], ranks: Ranks) -> dict[int, float]:
    """Return the score of every row of `bins`, distributed over the ranks; all ranks must call it."""
    own = dict(chain.from_iterable(score_bins(model, source, bins[ranks.dp_rank :: ranks.dp_size], ranks)))
    return {row: score for part in ranks.gather(own) for row, score in part.items()}


@torch.inference_mode()
def score_bins(
    model: "RewardModel",
    source: SampleSource,
    bins: Sequence[list[int]],
    ranks: Ranks,
    stops: Callable[[], bool] = lambda: False,
) -> Generator[list[tuple[int, float]]]:
    """Yield (row, score) of the rows of each bin, in order; ranks that share a model must iterate together.

    A bin is launched before the scores of the previous bin are read, so that the device always has
    work. `stops` is called after each launch, including a bin without rows, which is not computed.
    Once it returns True, no further bin is launched, and the launched ones are still read.
    """
    multiple = padding_multiple(model.config.tensor_model_parallel_size, ranks.cp_size, model.config.sequence_parallel)

    def collated(number: int) -> PackedBatch:
        batch = share_of_context(source.collate(bins[number], multiple), ranks.cp_rank, ranks.cp_size)
        return batch.pin() if ranks.device.type == "cuda" else batch

    launched: deque[Callable[[], list[tuple[int, float]]]] = deque()
    with closing(prefetch(collated, range(len(bins)))) as batches:
        for rows, batch in zip(bins, batches, strict=True):
            launched.append(_launch(model, rows, batch, ranks.device))
            if len(launched) > 1:
                yield launched.popleft()()
            if stops():
                break
    while launched:
        yield launched.popleft()()


def _launch(
    model: "RewardModel", rows: list[int], batch: PackedBatch, device: torch.device
) -> Callable[[], list[tuple[int, float]]]:
    """Launch the forward pass of a bin; return a function that waits for its (row, score) pairs.

    The function does not wait for bins that are launched later.
    """
    if not rows:
        return list
    scores = model(batch.to(device)).float().to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def read() -> list[tuple[int, float]]:
        if copied is not None:
            copied.synchronize()
        return list(zip(rows, scores.tolist(), strict=True))

    return read
