"""The rows of each optimizer step, packed into batches for one data parallel rank.

The order of rows is a pure function of (seed, epoch, index), of the sources and their shares if they
are mixed, and of the prompts if rows are ordered by prompt. There is no generator state, so a run can
resume at any step, with any number of ranks, and get the same rows.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from offline_align.data.batch import PackedBatch
from offline_align.data.bins import PrefixGroup, RowSource
from offline_align.data.collate import Indices
from offline_align.data.context import share_of_context
from offline_align.data.mixture import Mixture
from offline_align.data.pack import pack
from offline_align.data.prefetch import prefetch


@dataclass(frozen=True)
class StepData:
    """The micro-batches of one optimizer step on this rank, and the totals over all ranks."""

    micro_batches: list[PackedBatch]
    num_rows: int
    """Rows of the global batch."""
    num_tokens: int
    """Tokens of these rows over all ranks; a shared prompt counts once."""
    num_padding: int
    """Padding tokens over all ranks."""
    squared_lengths: int
    """Twice the (query, key) pairs of attention inside these rows: the sum of their squared lengths."""
    num_read: int
    """Positions that the head reads: targets of a policy, last tokens of a reward model's answers."""

    def pin(self) -> "StepData":
        """Return a copy with the batches in pinned memory."""
        return replace(self, micro_batches=[batch.pin() for batch in self.micro_batches])


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> Indices:
    """Return the order of rows in `epoch`: a permutation that depends only on the arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


@lru_cache(maxsize=2)
def order_by_prompt(source: RowSource, seed: int, epoch: int) -> Indices:
    """Return the order of rows in `epoch` with all rows of a prompt moved to the position of the first of them.

    If sources are mixed and a row occurs several times in an epoch, each time counts as another prompt.
    """
    order = order_of_epoch(len(source), seed, epoch, source.mixture)
    prompts = source.prompts[order]
    if source.mixture is not None:
        prompts = prompts + source.mixture.passes(seed, epoch) * len(source)
    _, first, number = np.unique(prompts, return_index=True, return_inverse=True)
    together: Indices = order[np.argsort(first[number], kind="stable")]
    return together


def order_of_epoch(num_rows: int, seed: int, epoch: int, mixture: Mixture | None) -> Indices:
    """Return the order of rows in `epoch`: that of the mixture, or a permutation of all rows without one."""
    return epoch_order(num_rows, seed, epoch) if mixture is None else mixture.order(seed, epoch)


def rows_of_step(
    step: int,
    global_batch_size: int,
    num_rows: int,
    total_samples: int,
    seed: int,
    by_prompt: RowSource | None = None,
    mixture: Mixture | None = None,
) -> list[int]:
    """Return the rows of optimizer step `step` (from 0); samples are counted across epochs.

    An epoch has `num_rows` rows, or those that `mixture` draws. If `by_prompt` is given, the rows of one
    of its prompts are consecutive.
    """

    def order(epoch: int) -> Indices:
        if by_prompt is not None:
            return order_by_prompt(by_prompt, seed, epoch)
        return order_of_epoch(num_rows, seed, epoch, mixture)

    size = num_rows if mixture is None else mixture.epoch_rows
    first = step * global_batch_size
    samples = range(first, min(first + global_batch_size, total_samples))
    return [int(order(k // size)[k % size]) for k in samples]


@dataclass(frozen=True)
class Loader:
    """The steps of a run for one data parallel rank, or for one of the context parallel ranks in it."""

    source: RowSource
    global_batch_size: int
    total_samples: int
    capacity: int
    """Most tokens of a bin."""
    seed: int
    dp_rank: int
    dp_size: int
    pad_to_multiple: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    by_prompt: bool = False
    """Whether a step takes the rows of a prompt together, as far as the batch has room."""

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run; the last one may have fewer rows."""
        return -(-self.total_samples // self.global_batch_size)

    def step(self, step: int) -> StepData:
        """Return the data of optimizer step `step`, counted from 0."""
        source, by_prompt = self.source, self.source if self.by_prompt else None
        size, total = self.global_batch_size, self.total_samples
        return self.pack_rows(rows_of_step(step, size, len(source), total, self.seed, by_prompt, source.mixture))

    def steps(self, first: int, pinned: bool = False) -> Generator[StepData]:
        """Yield the data of step `first` and all later steps, prefetched; set `pinned` for a GPU."""

        def make(step: int) -> StepData:
            return self.step(step).pin() if pinned else self.step(step)

        return prefetch(make, range(first, self.total_steps))

    def pack_rows(self, rows: list[int]) -> StepData:
        """Return `rows` packed into bins; only the bins of this rank are collated."""
        groups = self._groups(rows)
        lengths = [group.tokens for group in groups]
        # A bin must hold at least its longest row, whatever the budget.
        packed = pack(lengths, max(self.capacity, max(lengths, default=1)), self.dp_size)
        bins = [[groups[i] for i in b] for b in packed]
        sizes = [self.source.size_of_groups(b) for b in bins]
        tokens = sum(size.tokens for size in sizes)
        return StepData(
            micro_batches=[self._collate(b) for b in bins[self.dp_rank :: self.dp_size]],
            num_rows=len(rows),
            num_tokens=tokens,
            num_padding=sum(self._padded(size.tokens) for size in sizes) - tokens,
            squared_lengths=sum(size.squared_lengths for size in sizes),
            num_read=int(self.source.num_read[rows].sum()),
        )

    def _groups(self, rows: list[int]) -> list[PrefixGroup]:
        """Return the prefix groups to pack, none with more than half of a rank's tokens.

        Otherwise the ranks would wait for the one with the largest group.
        """
        groups = self.source.groups(rows, self.capacity)
        most = sum(group.tokens for group in groups) // (2 * self.dp_size)
        if self.dp_size == 1 or all(group.tokens <= most or len(group.rows) == 1 for group in groups):
            return groups
        return self.source.groups(rows, min(self.capacity, most))

    def _collate(self, groups: list[PrefixGroup]) -> PackedBatch:
        rows = [row for group in groups for row in group.rows]
        return share_of_context(self.source.collate(rows, self.pad_to_multiple), self.cp_rank, self.cp_size)

    def _padded(self, tokens: int) -> int:
        return max(1, -(-tokens // self.pad_to_multiple)) * self.pad_to_multiple

    def in_order(self, rows_at_once: int, pinned: bool = False) -> Generator[StepData]:
        """Yield all rows once, in order, `rows_at_once` at a time (for validation), prefetched."""

        def make(first: int) -> StepData:
            data = self.pack_rows(list(range(first, min(first + rows_at_once, len(self.source)))))
            return data.pin() if pinned else data

        return prefetch(make, range(0, len(self.source), rows_at_once))
