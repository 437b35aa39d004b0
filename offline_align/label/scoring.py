"""Scores of a reward model over many rows, packed, data parallel, and independent of both.

Which rows share a bin is a pure function of the rows: neither the number of ranks nor what an earlier attempt has
done changes it. A row's score is therefore the same to the bit in every run on the same kind of machine.
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

# Rows that are sorted and packed together: enough for full bins, few enough for steady progress.
_WINDOW_ROWS = 1024


def score_samples(
    checkpoint: Path,
    samples: Sequence[Sample],
    run: RunSection,
    data: DataSection,
    parallel: ParallelSection,
    trainer: ComputeSection,
) -> list[float]:
    """Return the raw reward of every sample, in order, in a session of its own (evaluation).

    NaN, with a warning, for a row whose response alone is longer than `data.max_length`.
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
    """Return the tokens of rows, with places in `rows` as their ids.

    Ids of samples need not differ; places do, and tell which rows were left out.
    """
    cache = Path(data.cache_dir) if data.cache_dir else Path(run.dir) / "cache"
    placed = [replace(row, sample=replace(row.sample, id=str(k))) for k, row in enumerate(rows)]
    tokens = tokenize_samples(placed, renderer, data, cache, empty_answers=True)
    say_what_is_read(renderer, tokens)
    return tokens


def say_what_is_read(renderer: Renderer, rows: TokenizedRows) -> None:
    """Say in one line how the reward model reads rows, with the first one as it sees it."""
    first = rows.ids[: rows.offsets[1]].tolist()
    form = f"data.template={renderer.template}"
    if renderer.reading:
        form = f"a reward model of others, {form}, ids and place of the score as in transformers"
    if renderer.day:
        form += f", data.template_date={renderer.day}"
    logger.info("first row, as the reward model reads it (%s): %r", form, renderer.tokenizer.shown(first))


def load_reward_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "RewardModel":
    """Return a reward model, ready to score, at any layout."""
    from offline_align.model.heads import RewardModel

    model = load_model(source, parallel, ranks, bf16)
    assert isinstance(model, RewardModel)
    return model


@effort.part("load")
def load_model(source: ModelSource, parallel: ParallelSection, ranks: Ranks, bf16: bool) -> "Policy | RewardModel":
    """Return a model for forward passes only, at any layout."""
    # megatron-core is imported once the session has prepared this process for it.
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
    """Return the tokens of all `samples`, the first one `announced` if that is asked for.

    Raises DataError where one would be left out, for no row may be lost.
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
    """Return which rows are scored together: bins of at most `capacity` tokens inside windows of the input.

    Answers to one prompt are neighbours in a bin where the source shares prompts.
    """
    bins: list[list[int]] = []
    for first in range(0, len(source), _WINDOW_ROWS):
        groups = source.groups(range(first, min(first + _WINDOW_ROWS, len(source))), capacity)
        lengths = [group.tokens for group in groups]
        packed = pack(lengths, max(capacity, *lengths))
        bins += [[row for i in b for row in groups[i].rows] for b in packed if b]
    return bins


def score_all(model: "RewardModel", source: SampleSource, bins: Sequence[list[int]], ranks: Ranks) -> dict[int, float]:
    """Return the score of every row of `bins`, which are dealt to the ranks; all of them call it together."""
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
    """Yield (row, score) of the rows of each bin, in order; ranks that share the bins must go through them together.

    A bin is launched before the scores of the one before it are read, so that the device always has work. After each
    launch `stops` is asked, also for a bin without rows, which is not computed; once it says yes, none is launched any
    more, and what has been is still read.
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
    """Launch the forward pass of a bin; the function that is returned waits for it and gives (row, score) of its rows.

    It does not wait for what is launched later.
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
