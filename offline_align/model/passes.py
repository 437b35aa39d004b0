"""Forward passes over all rows of a source, in packed bins that data parallel ranks share.

The assignment of rows to bins depends only on the rows and the capacity, not on the number of ranks
or the progress of earlier attempts. So the result for a row is the same to the bit in every run on
the same kind of machine.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import batched, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.data.bins import RowSource
from offline_align.data.context import share_of_context
from offline_align.data.journal import Journal
from offline_align.data.pack import pack, padding_multiple
from offline_align.data.prefetch import prefetch
from offline_align.data.score_journal import Scores, ScoreWriter, read_scores
from offline_align.distributed.setup import Ranks
from offline_align.distributed.stopping import StopVote, stop_requests
from offline_align.errors import StoppedEarly
from offline_align.progress import Meter
from offline_align.wording import counted

# Number of consecutive rows that are packed at a time: enough to fill the bins, and few enough for
# steady progress.
_WINDOW_ROWS = 1024

Compute = Callable[[PackedBatch], Tensor]
"""Computes a number for each segment of a bin: [S]; for `target_numbers`, for each target: [N]."""

TargetNumbers = npt.NDArray[np.float32]
"""A number for each target of a row: [targets]."""


def plan_bins(source: RowSource, capacity: int) -> list[list[int]]:
    """Return the bins of rows that are computed together, each of at most `capacity` tokens.

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


def computed_bins(
    compute: Compute,
    source: RowSource,
    bins: Sequence[list[int]],
    ranks: Ranks,
    sequence_parallel: bool,
    stops: Callable[[], bool] = lambda: False,
) -> Generator[list[tuple[int, Scores]]]:
    """Yield a list of (row, scores) for each bin, in order. Ranks that share a model must iterate together.

    A row has as many scores as segments. The forward pass of a bin is launched before the scores of the
    previous bin are read, so the device always has work. A bin without rows is not computed. `stops` is
    called after every bin, also an empty one. After it returns True, no further bin is launched, but
    launched bins are still yielded.
    """

    def by_row(rows: list[int], scores: Tensor) -> list[tuple[int, Scores]]:
        return list(zip(rows, scores.view(len(rows), -1).tolist(), strict=True))

    return _computed(compute, by_row, source, bins, ranks, sequence_parallel, stops)


def target_numbers(
    compute: Compute, source: RowSource, capacity: int, ranks: Ranks, sequence_parallel: bool
) -> list[TargetNumbers]:
    """Return the numbers that `compute` returns for the targets of each row, for all rows, in order.

    `compute` returns a number for each target of the whole bin (see `at_all_targets`), and `capacity` is
    the size of a bin in tokens. A collective: the ranks share the work, and all must call it.
    """

    def by_row(rows: list[int], numbers: Tensor) -> list[tuple[int, TargetNumbers]]:
        ends = np.cumsum(source.num_read[rows])
        return list(zip(rows, np.split(numbers.float().numpy(), ends[:-1]), strict=True))

    own = plan_bins(source, capacity)[ranks.dp_rank :: ranks.dp_size]
    passes = _computed(compute, by_row, source, own, ranks, sequence_parallel, lambda: False)
    found = dict(chain.from_iterable(passes))
    merged = {row: numbers for part in ranks.gather(found) for row, numbers in part.items()}
    return [merged[row] for row in range(len(source))]


@torch.no_grad()
def _computed[Result](
    compute: Compute,
    by_row: Callable[[list[int], Tensor], list[tuple[int, Result]]],
    source: RowSource,
    bins: Sequence[list[int]],
    ranks: Ranks,
    sequence_parallel: bool,
    stops: Callable[[], bool],
) -> Generator[list[tuple[int, Result]]]:
    """Yield what `by_row` makes of the rows of each bin and its numbers; see `computed_bins`."""
    multiple = padding_multiple(ranks.tp_size, ranks.cp_size, sequence_parallel)

    def collated(number: int) -> PackedBatch:
        batch = share_of_context(source.collate(bins[number], multiple), ranks.cp_rank, ranks.cp_size)
        return batch.pin() if ranks.device.type == "cuda" else batch

    launched: deque[Callable[[], list[tuple[int, Result]]]] = deque()
    with closing(prefetch(collated, range(len(bins)))) as batches:
        for rows, batch in zip(bins, batches, strict=True):
            launched.append(_launch(compute, rows, batch, ranks.device, by_row))
            if len(launched) > 1:
                yield launched.popleft()()
            if stops():
                break
    while launched:
        yield launched.popleft()()


def _launch[Result](
    compute: Compute,
    rows: list[int],
    batch: PackedBatch,
    device: torch.device,
    by_row: Callable[[list[int], Tensor], list[tuple[int, Result]]],
) -> Callable[[], list[tuple[int, Result]]]:
    """Launch the forward pass of a bin; return a function that waits for its numbers and returns them `by_row`.

    That function does not wait for bins that are launched later.
    """
    if not rows:
        return list
    numbers = compute(batch.to(device)).to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def read() -> list[tuple[int, Result]]:
        if copied is not None:
            copied.synchronize()
        return by_row(rows, numbers)

    return read


def complete_journal(
    journal: Journal,
    source: RowSource,
    width: int,
    capacity: int,
    build: Callable[[], tuple[Compute, bool]],
    ranks: Ranks,
    *,
    title: str,
    max_time: str | None,
    flush_rows: int,
) -> None:
    """Compute the scores of all rows that `journal` lacks, and write them to it.

    `width` is the number of scores of a row, and `capacity` the size of a bin in tokens. `build` returns
    the computation and whether it is sequence parallel; it is called only if a row is missing. All ranks
    must call this together. Raises StoppedEarly, with all scores on disk, if a rank was asked to stop.
    """
    done = ranks.from_main(lambda: read_scores(journal, len(source), width))
    if len(done) == len(source):
        return
    compute, sequence_parallel = build()
    left = [b for b in plan_bins(source, capacity) if any(row not in done for row in b)]
    # In each round every rank computes one bin. If one rank is asked to stop, all stop after the same
    # round. A rank that has no bin in the last round still votes.
    rounds = list(batched(left, ranks.dp_size))
    own = [share[ranks.dp_rank] if ranks.dp_rank < len(share) else [] for share in rounds]
    writes = ranks.tp_rank == 0 and ranks.cp_rank == 0
    with (
        stop_requests(max_time, "the rows that are being computed") as stop,
        ScoreWriter(journal, flush_rows, writes) as writer,
        Meter(title, len(source), "rows", len(done), ranks.is_main) as meter,
    ):
        vote = StopVote(stop, ranks)
        with closing(computed_bins(compute, source, own, ranks, sequence_parallel, vote)) as computed:
            # `computed` is shorter than `rounds` if the ranks vote to stop.
            for share, scores in zip(rounds, computed, strict=False):
                for row, values in scores:
                    writer.add(row, values)
                meter.advance(sum(map(len, share)))
        if vote.newest():
            raise StoppedEarly(
                f"stopped after {meter.done:,} of {counted(len(source), 'row')}; their scores are saved: "
                "run the same command to continue"
            )
    # All scores must be on disk before any rank reads them.
    ranks.barrier()
