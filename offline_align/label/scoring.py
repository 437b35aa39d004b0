"""Score rows with a reward model, in packed bins that are distributed over data parallel ranks.

The assignment of rows to bins depends only on the rows and the capacity, not on the number of ranks
or the progress of earlier attempts. So the score of a row is the same to the bit in every run on the
same kind of machine.
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

# Number of consecutive rows that are packed at a time: enough to fill the bins, and few enough for
# steady progress.
_WINDOW_ROWS = 1024


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
            missing = len(samples) - len(merged)
            logger.warning("%d of %d answers have no score: %s", missing, len(samples), reasons(tokens.dropped))
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
    first = rows.ids[: rows.offsets[1]].tolist()
    form = f"data.template={renderer.template}"
    if renderer.reading:
        form = f"a third-party reward model, {form}, ids and scored token as in transformers"
    if renderer.day:
        form += f", data.template_date={renderer.day}"
    logger.info("first row, as the reward model reads it (%s): %r", form, renderer.tokenizer.shown(first))


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
            f"row {lost[0]}: cannot be scored ({reasons(rows.dropped)} of {len(samples)} rows): "
            f"raise data.max_length={data.max_length}{fix}"
        )
    if announced:
        say_what_is_read(renderer, rows)
    return SampleSource(rows, share_prompts)


def plan_bins(source: SampleSource, capacity: int) -> list[list[int]]:
    """Return the bins of rows that are scored together, each of at most `capacity` tokens.

    All rows of a bin come from one window of `_WINDOW_ROWS` consecutive rows. If the source shares
    prompts, answers to the same prompt are adjacent in a bin. If a window has a row longer than
    `capacity`, the length of that row is the limit for all bins of the window.
    """
    bins: list[list[int]] = []
    for first in range(0, len(source), _WINDOW_ROWS):
        groups = source.groups(range(first, min(first + _WINDOW_ROWS, len(source))), capacity)
        lengths = [group.tokens for group in groups]
        packed = pack(lengths, max(capacity, *lengths))
        bins += [[row for i in b for row in groups[i].rows] for b in packed if b]
    return bins


def score_all(model: "RewardModel", source: SampleSource, bins: Sequence[list[int]], ranks: Ranks) -> dict[int, float]:
    """Return {row: score} for all rows of `bins`. A collective: the ranks share the work, and all must call it."""
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
    """Yield a list of (row, score) for each bin, in order. Ranks that share a model must iterate together.

    The forward pass of a bin is launched before the scores of the previous bin are read, so the device
    always has work. A bin without rows is not computed. `stops` is called after every bin, also an
    empty one. After it returns True, no further bin is launched, but launched bins are still yielded.
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
    """Launch the forward pass of a bin; return a function that waits for and returns its (row, score) pairs.

    That function does not wait for bins that are launched later.
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
