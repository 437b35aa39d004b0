"""Rows that can be packed, and the bins that they make: tokenised samples, and tokenised pairs.

Rows of a bin that begin with the same prompt can have it once: `head` is the row that brings it, the others look back
on its tokens. Nothing changes by that, for what a causal model makes of a token depends on nothing after it.

Shape legend: S segments (rows of a bin, two for a pair), T tokens of the bin, K keys of its rows, N targets.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from offline_align.config.sections import ComputeSection, ParallelSection
from offline_align.data.batch import AttentionSlice, PackedBatch, SharedKeys
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows

Indices = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

# Shorter beginnings are computed again: what is saved would not pay for looking back.
_LEAST_SHARED = 16


class RowSource(Protocol):
    """Rows that can be packed: tokenised samples or pairs."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def lengths(self, rows: Sequence[int]) -> Indices:
        """Return the tokens that each of `rows` adds to a bin."""
        ...

    def squared_lengths(self, rows: Sequence[int]) -> int:
        """Return what attention over `rows` costs: half of it is the number of (query, key) pairs."""
        ...

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, its length padded to a multiple."""
        ...


def shares_prompts(trainer: ComputeSection, parallel: ParallelSection) -> bool:
    """Return whether rows of a bin have a common prompt once; context parallelism cuts bins of whole rows."""
    return trainer.share_prompts and parallel.context_parallel_size == 1


class SampleSource:
    """Tokenised samples: one segment a row, targets weighted by the row."""

    def __init__(self, rows: TokenizedRows, share_prompts: bool = False) -> None:
        self.rows = rows
        self.share_prompts = share_prompts
        # Every step asks for them, and the set may have millions of rows.
        self._lengths = np.diff(rows.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, rows: Sequence[int]) -> Indices:
        """Return the tokens of each of `rows`, prompts included."""
        found: Indices = self._lengths[list(rows)]
        return found

    def squared_lengths(self, rows: Sequence[int]) -> int:
        """Return the sum of the squared lengths of `rows`."""
        return int((self.lengths(rows) ** 2).sum())

    def num_tokens(self) -> int:
        """Return the tokens of all rows, prompts included."""
        return int(self._lengths.sum())

    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""
        return _checksum(self.rows)

    def groups(self, rows: Sequence[int], capacity: int) -> list[tuple[list[int], int]]:
        """Return `rows` in groups that belong into one bin, and the tokens of each group.

        Rows of the same prompt are a group, as many as fit `capacity` tokens; without `share_prompts` every row is one.
        """
        if not self.share_prompts:
            return [([row], int(self._lengths[row])) for row in rows]
        found: list[tuple[list[int], int]] = []
        open_groups: dict[bytes, int] = {}
        for row in rows:
            prompt = self._prompt(row).tobytes()
            if (at := open_groups.get(prompt)) is not None:
                members, tokens = found[at]
                tokens += int(self._lengths[row]) - self._shared(members[0], row)
                if tokens <= capacity:
                    found[at] = ([*members, row], tokens)
                    continue
            open_groups[prompt] = len(found)
            found.append(([row], int(self._lengths[row])))
        return found

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, with all their targets; neighbours may share their prompts."""
        segments: list[_Segment] = []
        head = 0
        for place, row in enumerate(rows):
            shared = self._shared(rows[head], row) if self.share_prompts and place else 0
            head = head if shared else place
            segments.append(_Segment(_ids(self.rows, row), head, shared))
        targets = _Targets(self.rows.target_start[list(rows)], self.rows.weight[list(rows)])
        row_ids = [self.rows.row_ids[row] for row in rows]
        return _assemble(segments, row_ids, targets, np.zeros(0, np.float32), pad_to_multiple)

    def _prompt(self, row: int) -> Ids:
        return _ids(self.rows, row)[: self.rows.target_start[row]]

    def _shared(self, head: int, row: int) -> int:
        """Return how many tokens `row` takes from `head`: 0, or its prompt and what the answers begin with alike."""
        prompt = self._prompt(row)
        if len(prompt) < _LEAST_SHARED or not np.array_equal(self._prompt(head), prompt):
            return 0
        return _common_beginning(_ids(self.rows, head), _ids(self.rows, row))


class PairSource:
    """Tokenised pairs: two segments a row, chosen first; no targets, scores are read at last tokens."""

    def __init__(self, pairs: TokenizedPairs, share_prompts: bool = False) -> None:
        self.pairs = pairs
        self.share_prompts = share_prompts
        self._chosen, self._rejected = np.diff(pairs.chosen.offsets), np.diff(pairs.rejected.offsets)

    def __len__(self) -> int:
        return len(self.pairs.chosen)

    def lengths(self, rows: Sequence[int]) -> Indices:
        """Return the tokens of each of `rows`: both answers, and the prompt once where it is shared."""
        places = list(rows)
        found: Indices = self._chosen[places] + self._rejected[places] - self._shared[places]
        return found

    def squared_lengths(self, rows: Sequence[int]) -> int:
        """Return the sum over both answers of the squared length, less the square of what they share."""
        places = list(rows)
        return int((self._chosen[places] ** 2 + self._rejected[places] ** 2 - self._shared[places] ** 2).sum())

    def fingerprint(self) -> int:
        """Return a checksum of the pairs and their order."""
        return _checksum(self.pairs.chosen, self.pairs.rejected)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds both answers of each pair of `rows`."""
        segments: list[_Segment] = []
        for row, shared in zip(rows, self._shared[list(rows)], strict=True):
            head = len(segments)
            segments.append(_Segment(_ids(self.pairs.chosen, row), head, 0))
            segments.append(_Segment(_ids(self.pairs.rejected, row), head if shared else head + 1, int(shared)))
        margins = np.nan_to_num(self.pairs.margin[list(rows)], nan=0.0).astype(np.float32)
        return _assemble(segments, [self.pairs.row_ids[r] for r in rows], None, margins, pad_to_multiple)

    @cached_property
    def _shared(self) -> Indices:
        """Return how many tokens the answers of each pair begin with in common, where that is worth it: [pairs]."""
        if not self.share_prompts:
            return np.zeros(len(self), np.int64)
        pairs = range(len(self))
        common = [_common_beginning(_ids(self.pairs.chosen, p), _ids(self.pairs.rejected, p)) for p in pairs]
        return np.array([n if n >= _LEAST_SHARED else 0 for n in common], np.int64)


def _ids(rows: TokenizedRows, row: int) -> Ids:
    return rows.ids[rows.offsets[row] : rows.offsets[row + 1]]


def _common_beginning(head: Ids, row: Ids) -> int:
    """Return how many tokens of `row` are those of `head`; its last is always its own, for a score is read there."""
    most = min(len(head), len(row) - 1)
    differs = np.flatnonzero(head[:most] != row[:most])
    return int(differs[0]) if differs.size else max(most, 0)


def _checksum(*columns: TokenizedRows) -> int:
    """Return the CRC-32 of all that decides a step."""
    checksum = 0
    for column in columns:
        for array in (column.ids, column.offsets, column.target_start, column.weight):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum


@dataclass(frozen=True)
class _Segment:
    """A row of a bin."""

    ids: Ids
    """The whole row."""
    head: int
    """Number of the segment that brings the tokens it begins with; its own number where none does."""
    shared: int
    """How many tokens those are."""


@dataclass(frozen=True)
class _Targets:
    """Of each segment: where its targets begin, and their weight."""

    start: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]


def _assemble(
    segments: list[_Segment],
    row_ids: list[str],
    targets: _Targets | None,
    margins: npt.NDArray[np.float32],
    multiple: int,
) -> PackedBatch:
    """Lay the segments' own tokens side by side, and fill up to a multiple of `multiple` tokens."""
    own = [s.ids[s.shared :] for s in segments]
    total = sum(map(len, own))
    # A rank without rows still takes part in collectives, with one padding segment that nothing is read from.
    padding = -total % multiple if total else multiple
    if padding:
        own.append(np.zeros(padding, dtype=np.int32))
    tokens = np.concatenate(own).astype(np.int64)
    lengths = np.array([len(ids) for ids in own])
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    shared = np.array([s.shared for s in segments] + [0] * (len(own) - len(segments)))
    positions = np.arange(len(tokens)) + np.repeat(shared - bounds[:-1], lengths)
    index, ids, weights = _places(segments, targets, bounds)
    keys, attention = _shared_keys(segments, bounds) if shared.any() else (None, ())
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        target_index=torch.from_numpy(index),
        target_ids=torch.from_numpy(ids),
        target_weights=torch.from_numpy(weights),
        last_index=torch.from_numpy(bounds[1 : len(segments) + 1] - 1),
        margins=torch.from_numpy(margins),
        row_ids=tuple(row_ids),
        num_padding=padding,
        slices=attention,
        shared_keys=keys,
    )


def _places(
    segments: list[_Segment], targets: _Targets | None, bounds: Indices
) -> tuple[Indices, Indices, npt.NDArray[np.float32]]:
    """Return the places whose next token is a target, those tokens, and the weight of each: [N] each."""
    if targets is None or not segments:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    starts = targets.start.tolist()
    counts = np.array([len(s.ids) - start for s, start in zip(segments, starts, strict=True)])
    ids = np.concatenate([s.ids[start:] for s, start in zip(segments, starts, strict=True)]).astype(np.int64)
    first = np.repeat(targets.start.astype(np.int64) - np.cumsum(counts) + counts, counts)
    before = np.arange(counts.sum()) + first - 1
    number = np.repeat(np.arange(len(segments)), counts)
    shared, heads = np.array([s.shared for s in segments])[number], np.array([s.head for s in segments])[number]
    places = np.where(before < shared, bounds[heads] + before, bounds[number] + before - shared)
    return places.astype(np.int64), ids, np.repeat(targets.weight, counts).astype(np.float32)


def _shared_keys(segments: list[_Segment], bounds: Indices) -> tuple[SharedKeys, tuple[AttentionSlice, ...]]:
    """Return the keys of all rows side by side, and which of them the queries of each row see."""
    # A padding segment is the last, and begins with nothing of others.
    parts = [(bounds[s.head], s.shared) for s in segments] + [(0, 0)] * (len(bounds) - 1 - len(segments))
    index, own, again, begin = [], [], [], 0
    lengths = np.diff(bounds)
    for (head, shared), start, length in zip(parts, bounds[:-1], lengths, strict=True):
        index += [np.arange(head, head + shared), np.arange(start, start + length)]
        again.append(np.arange(begin, begin + shared))
        own.append(np.arange(begin + shared, begin + shared + length))
        begin += shared + int(length)
    every, repeated = np.concatenate(index), np.concatenate(again)
    seen = lengths + np.array([shared for _, shared in parts])
    attention = AttentionSlice(
        key_range=(0, len(every)),
        cu_seqlens_q=torch.from_numpy(bounds.astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(np.concatenate(([0], np.cumsum(seen))).astype(np.int32)),
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(seen.max()),
    )
    keys = SharedKeys(*(torch.from_numpy(a) for a in (every, np.concatenate(own), repeated, every[repeated])))
    return keys, (attention,)
