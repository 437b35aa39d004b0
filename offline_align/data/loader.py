"""Which rows each step takes, and their packed batches on this data parallel rank.

The order of rows is a pure function of (seed, epoch, index): nothing is consumed from a generator, so a run continues
at any step, at any number of ranks, with the same rows.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from offline_align.data.ahead import prepared_ahead
from offline_align.data.batch import PackedBatch
from offline_align.data.context import share_of_context
from offline_align.data.pack import pack
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows

Indices = npt.NDArray[np.int64]


class RowSource(Protocol):
    """Rows that can be packed: tokenised samples or pairs."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each row: [rows]."""
        ...

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, its length padded to a multiple."""
        ...


@dataclass(frozen=True)
class StepData:
    """What one optimizer step computes on this rank, and what all ranks compute together."""

    micro_batches: list[PackedBatch]
    num_rows: int
    """Rows of the global batch."""
    num_tokens: int
    """Tokens of those rows, over all ranks."""
    num_padding: int
    """Tokens computed beside them, over all ranks."""
    squared_lengths: int
    """Sum of squared row lengths, for the cost of attention."""


class SampleSource:
    """Tokenised samples: one segment a row, targets weighted by the row."""

    def __init__(self, rows: TokenizedRows) -> None:
        self.rows = rows
        # Every step asks for them, and the set may have millions of rows.
        self._lengths = np.diff(rows.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each row."""
        return self._lengths

    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""
        return _checksum(self.rows)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, with all their targets."""
        return _assemble([_Segments(self.rows, rows)], [self.rows.row_ids[r] for r in rows], None, pad_to_multiple)


class PairSource:
    """Tokenised pairs: two segments a row, chosen first; no targets, scores are read at last tokens."""

    def __init__(self, pairs: TokenizedPairs) -> None:
        self.pairs = pairs
        self._lengths = np.diff(pairs.chosen.offsets) + np.diff(pairs.rejected.offsets)

    def __len__(self) -> int:
        return len(self.pairs.chosen)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of both answers of each pair together."""
        return self._lengths

    def fingerprint(self) -> int:
        """Return a checksum of the pairs and their order."""
        return _checksum(self.pairs.chosen, self.pairs.rejected)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds both answers of each pair of `rows`."""
        parts = [_Segments(self.pairs.chosen, rows), _Segments(self.pairs.rejected, rows)]
        margins = np.nan_to_num(self.pairs.margin[list(rows)], nan=0.0)
        return _assemble(parts, [self.pairs.row_ids[r] for r in rows], margins, pad_to_multiple)


def _checksum(*columns: TokenizedRows) -> int:
    """Return the CRC-32 of all that decides a step."""
    checksum = 0
    for column in columns:
        for array in (column.ids, column.offsets, column.target_start, column.weight):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


@dataclass(frozen=True)
class _Segments:
    """Rows of one tokenised column."""

    rows: TokenizedRows
    chosen: Sequence[int]

    def ids(self, i: int) -> npt.NDArray[np.int32]:
        row = self.chosen[i]
        return self.rows.ids[self.rows.offsets[row] : self.rows.offsets[row + 1]]


def _assemble(
    parts: list[_Segments], row_ids: list[str], margins: npt.NDArray[np.float32] | None, multiple: int
) -> PackedBatch:
    """Lay segments side by side, parts interleaved row by row, and fill up to a multiple of `multiple` tokens."""
    count = len(row_ids)
    segments = [part.ids(i) for i in range(count) for part in parts]
    lengths = np.array([len(s) for s in segments], dtype=np.int64)
    total = int(lengths.sum())
    # A rank without rows still takes part in collectives, with one padding segment that nothing is read from.
    padding = -total % multiple if total else multiple
    if padding:
        segments.append(np.zeros(padding, dtype=np.int32))
    tokens = np.concatenate(segments).astype(np.int64)
    bounds = np.concatenate(([0], np.cumsum([len(s) for s in segments]))).astype(np.int32)
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    index, weights = _targets(parts[0], bounds) if margins is None else (np.zeros(0, np.int64), np.zeros(0, np.float32))
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(np.arange(len(tokens)) - starts)[None],
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        target_index=torch.from_numpy(index),
        target_ids=torch.from_numpy(tokens[index + 1]),
        target_weights=torch.from_numpy(weights),
        last_index=torch.from_numpy(bounds[1 : len(lengths) + 1].astype(np.int64) - 1),
        margins=torch.from_numpy(np.zeros(0, np.float32) if margins is None else margins.astype(np.float32)),
        row_ids=tuple(row_ids),
        num_padding=padding,
    )


def _targets(part: _Segments, bounds: npt.NDArray[np.int32]) -> tuple[Indices, npt.NDArray[np.float32]]:
    """Return the places whose next token is a target, and the weight of each."""
    chosen = np.asarray(part.chosen, dtype=np.int64)
    if not chosen.size:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    first = bounds[: len(chosen)] + part.rows.target_start[chosen] - 1
    last = bounds[1 : len(chosen) + 1] - 1
    counts = last - first
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    return places.astype(np.int64), np.repeat(part.rows.weight[chosen], counts).astype(np.float32)


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> Indices:
    """Return the order of rows in `epoch`: a permutation that depends on nothing but the arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


def rows_of_step(step: int, global_batch_size: int, num_rows: int, total_samples: int, seed: int) -> list[int]:
    """Return the rows of optimizer step `step` (from 0): samples are counted on through the epochs."""
    first = step * global_batch_size
    samples = range(first, min(first + global_batch_size, total_samples))
    return [int(epoch_order(num_rows, seed, k // num_rows)[k % num_rows]) for k in samples]


@dataclass(frozen=True)
class Loader:
    """The steps of a run as seen by one data parallel rank, or by one of the ranks that share its bins."""

    source: RowSource
    global_batch_size: int
    total_samples: int
    capacity: int
    """Tokens of a bin."""
    seed: int
    dp_rank: int
    dp_size: int
    pad_to_multiple: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; the last one may be short."""
        return -(-self.total_samples // self.global_batch_size)

    def step(self, step: int) -> StepData:
        """Return the data of optimizer step `step`, counted from 0."""
        rows = rows_of_step(step, self.global_batch_size, len(self.source), self.total_samples, self.seed)
        return self.pack_rows(rows)

    def steps(self, first: int, pinned: bool = False) -> Iterator[StepData]:
        """Yield the data of step `first` and of all after it, prepared ahead; `pinned` memory is for a GPU."""

        def make(step: int) -> StepData:
            data = self.step(step)
            return replace(data, micro_batches=[b.pin() for b in data.micro_batches]) if pinned else data

        return prepared_ahead(make, range(first, self.total_steps))

    def pack_rows(self, rows: list[int]) -> StepData:
        """Return `rows` packed into bins, those of this rank collated."""
        lengths = self.source.lengths()[rows]
        # A bin must hold at least its longest row, whatever the budget.
        bins = pack(lengths.tolist(), max(self.capacity, int(lengths.max(initial=1))), self.dp_size)
        own = [[rows[i] for i in b] for b in bins[self.dp_rank :: self.dp_size]]
        tokens = int(lengths.sum())
        computed = sum(self._padded(int(lengths[b].sum())) for b in bins)
        return StepData(
            micro_batches=[self._collate(b) for b in own],
            num_rows=len(rows),
            num_tokens=tokens,
            num_padding=computed - tokens,
            squared_lengths=int((lengths**2).sum()),
        )

    def _collate(self, rows: list[int]) -> PackedBatch:
        return share_of_context(self.source.collate(rows, self.pad_to_multiple), self.cp_rank, self.cp_size)

    def _padded(self, tokens: int) -> int:
        return max(1, -(-tokens // self.pad_to_multiple)) * self.pad_to_multiple

    def in_order(self, rows_at_once: int) -> Iterator[StepData]:
        """Yield all rows once, in order, `rows_at_once` at a time (validation)."""
        for first in range(0, len(self.source), rows_at_once):
            yield self.pack_rows(list(range(first, min(first + rows_at_once, len(self.source)))))
