"""Rows that can be packed, and the bins that they make: tokenised samples, and tokenised pairs.

Rows with the same prompt that stand side by side in a bin can have it once: the first brings it, the others look back
on its tokens. Nothing changes by that, for what a causal model makes of a token depends on nothing after it.
"""

import hashlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from offline_align.config.sections import ComputeSection, ParallelSection
from offline_align.data.batch import PackedBatch
from offline_align.data.collate import Ids, Indices, Segment, Targets, assemble
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows

# Shorter beginnings are computed again: what is saved would not pay for looking back.
_LEAST_SHARED = 16

MOST_KEYS_IN_TRAINING = 4.0
"""Keys that rows of one prompt see, over the tokens that are computed of them: three quarters are saved at the most.

Training keeps the keys of every row for the gradient, so that without a limit memory would grow with the answers.
"""


def shares_prompts(trainer: ComputeSection, parallel: ParallelSection) -> bool:
    """Return whether rows of a bin have a common prompt once; context parallelism cuts bins of whole rows."""
    return trainer.share_prompts and parallel.context_parallel_size == 1


@dataclass(frozen=True)
class BinSize:
    """What a bin costs."""

    tokens: int
    """Tokens that are computed, without padding."""
    squared_lengths: int
    """Twice the (query, key) pairs of attention."""


class PrefixGroup:
    """Rows that have their prompt once: the first brings it, and the others stand behind it.

    `sequences` are those of the first row. Where `shares` is not set nothing is computed once, not even inside a row.
    """

    def __init__(self, prompt: bytes, row: int, sequences: Sequence[Ids], shares: bool) -> None:
        self.prompt = prompt
        """What the rows have in common; empty: nothing, and no row joins another."""
        self.rows = [row]
        self._head, *others = sequences
        self.sequences = [(self._head, 0), *((ids, _common_beginning(self._head, ids, shares)) for ids in others)]
        """Ids, and how many of them are those that the first sequence begins with."""
        self.tokens, self._keys, self.squared_lengths = _costs(self.sequences)

    def joined_by(self, row: int, sequences: Sequence[Ids], capacity: float, most_keys: float) -> bool:
        """Take `row`, unless that makes more than `capacity` tokens or too many keys; return whether it was taken."""
        added = [(ids, _common_beginning(self._head, ids)) for ids in sequences]
        tokens, keys, squared_lengths = _costs(added)
        tokens, keys = self.tokens + tokens, self._keys + keys
        if tokens > capacity or keys > most_keys * tokens:
            return False
        self.rows.append(row)
        self.sequences += added
        self.tokens, self._keys = tokens, keys
        self.squared_lengths += squared_lengths
        return True

    def segments(self, first: int) -> Iterator[Segment]:
        """Yield the segments of a bin, the first of them being its `first`."""
        for number, (ids, shared) in enumerate(self.sequences, first):
            yield Segment(ids, first if shared else number, shared)


def _costs(sequences: Sequence[tuple[Ids, int]]) -> tuple[int, int, int]:
    """Return the tokens that are computed of sequences, the keys that they see, and their squared lengths."""
    tokens = keys = squared_lengths = 0
    for ids, shared in sequences:
        length = len(ids)
        tokens, keys = tokens + length - shared, keys + length
        squared_lengths += length * length - shared * shared
    return tokens, keys, squared_lengths


class RowSource(ABC):
    """Rows that can be packed: of a sequence each, or of two.

    With `share_prompts` those of one prompt have it once, as long as they see no more than `most_keys` keys for each of
    their tokens that is computed. `prompted` are rows, or one side of them, with their prompts.
    """

    def __init__(self, prompted: TokenizedRows, share_prompts: bool, most_keys: float) -> None:
        self._prompted, self.share_prompts, self.most_keys = prompted, share_prompts, most_keys

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._prompted)

    @abstractmethod
    def num_tokens(self) -> int:
        """Return the tokens of all rows, each with its prompt."""

    @abstractmethod
    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""

    @abstractmethod
    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, in which neighbours may share their prompts; its length is padded."""

    @abstractmethod
    def _sequences(self, row: int) -> list[Ids]: ...

    def groups(self, rows: Sequence[int], capacity: int) -> list[PrefixGroup]:
        """Return `rows` as groups that belong into one bin: those of one prompt, as many as fit `capacity` tokens."""
        found: list[PrefixGroup] = []
        latest: dict[bytes, PrefixGroup] = {}
        for row in rows:
            prompt = self._common(row)
            group = latest.get(prompt)
            if group is None or not self._join(group, row, capacity):
                latest[prompt] = self._begin(prompt, row)
                found.append(latest[prompt])
        return found

    def size(self, rows: Sequence[int]) -> BinSize:
        """Return what the bin of `rows` costs."""
        groups = self._prefix_groups(rows)
        return BinSize(sum(f.tokens for f in groups), sum(f.squared_lengths for f in groups))

    def size_of_groups(self, groups: Sequence[PrefixGroup]) -> BinSize:
        """Return what the bin of the rows of `groups` costs, which were made with this source."""
        # In a bin, where there is no limit to a group, neighbours of one prompt become one.
        if any(left.prompt and left.prompt == right.prompt for left, right in pairwise(groups)):
            return self.size([row for group in groups for row in group.rows])
        return BinSize(sum(g.tokens for g in groups), sum(g.squared_lengths for g in groups))

    @cached_property
    def prompts(self) -> Indices:
        """The number of each row's prompt: [rows]. Rows with the same prompt have the same."""
        numbers: dict[bytes, int] = {}
        # A million prompts themselves would take gigabytes.
        digests = (hashlib.blake2b(self._prompt(row), digest_size=16).digest() for row in range(len(self)))
        return np.fromiter((numbers.setdefault(d, len(numbers)) for d in digests), np.int64, len(self))

    def repeated_share(self) -> float:
        """Return how much of all tokens are prompts that an earlier row has had already."""
        lengths = self._prompted.prompt_length
        _, first = np.unique(self.prompts, return_index=True)
        return float(lengths.sum() - lengths[first].sum()) / self.num_tokens()

    def _prompt(self, row: int) -> Ids:
        """Return what stands before the response and its condition."""
        begin = self._prompted.offsets[row]
        return self._prompted.ids[begin : begin + self._prompted.prompt_length[row]]

    def _segments(self, rows: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        for group in self._prefix_groups(rows):
            segments += group.segments(len(segments))
        return segments

    def _prefix_groups(self, rows: Sequence[int]) -> list[PrefixGroup]:
        """Return neighbours of a bin together that share a prompt."""
        found: list[PrefixGroup] = []
        for row in rows:
            prompt = self._common(row)
            last = found[-1] if found else None
            if last is None or last.prompt != prompt or not self._join(last, row, math.inf):
                found.append(self._begin(prompt, row))
        return found

    def _common(self, row: int) -> bytes:
        """Return the prompt where it is worth sharing, else nothing."""
        if not self.share_prompts:
            return b""
        prompt = self._prompt(row)
        return prompt.tobytes() if len(prompt) >= _LEAST_SHARED else b""

    def _begin(self, prompt: bytes, row: int) -> PrefixGroup:
        return PrefixGroup(prompt, row, self._sequences(row), self.share_prompts)

    def _join(self, group: PrefixGroup, row: int, capacity: float) -> bool:
        return bool(group.prompt) and group.joined_by(row, self._sequences(row), capacity, self.most_keys)


class SampleSource(RowSource):
    """Tokenised samples: one segment a row, targets weighted by the row."""

    def __init__(self, rows: TokenizedRows, share_prompts: bool = False, most_keys: float = math.inf) -> None:
        super().__init__(rows, share_prompts, most_keys)
        self.rows = rows

    def num_tokens(self) -> int:
        """Return the tokens of all rows, each with its prompt."""
        return int(self.rows.offsets[-1] - self.rows.offsets[0])

    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""
        return _checksum(self.rows)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds `rows`, with all their targets."""
        targets = Targets(self.rows.target_start[list(rows)], self.rows.weight[list(rows)])
        row_ids = [self.rows.row_ids[row] for row in rows]
        return assemble(self._segments(rows), row_ids, targets, np.zeros(0, np.float32), pad_to_multiple)

    def _sequences(self, row: int) -> list[Ids]:
        return [_ids(self.rows, row)]


class PairSource(RowSource):
    """Tokenised pairs: two segments a row, chosen first; no targets, scores are read at last tokens."""

    def __init__(self, pairs: TokenizedPairs, share_prompts: bool = False, most_keys: float = math.inf) -> None:
        super().__init__(pairs.chosen, share_prompts, most_keys)
        self.pairs = pairs

    def num_tokens(self) -> int:
        """Return the tokens of all pairs; where prompts are shared, both answers of each have theirs once."""
        both = sum(int(side.offsets[-1] - side.offsets[0]) for side in (self.pairs.chosen, self.pairs.rejected))
        return both - (int(self.pairs.chosen.prompt_length.sum()) if self.share_prompts else 0)

    def fingerprint(self) -> int:
        """Return a checksum of the pairs and their order."""
        return _checksum(self.pairs.chosen, self.pairs.rejected)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin that holds both answers of each pair of `rows`."""
        margins = np.nan_to_num(self.pairs.margin[list(rows)], nan=0.0).astype(np.float32)
        row_ids = [self.pairs.row_ids[row] for row in rows]
        return assemble(self._segments(rows), row_ids, None, margins, pad_to_multiple)

    def _sequences(self, row: int) -> list[Ids]:
        return [_ids(self.pairs.chosen, row), _ids(self.pairs.rejected, row)]


def _ids(rows: TokenizedRows, row: int) -> Ids:
    return rows.ids[rows.offsets[row] : rows.offsets[row + 1]]


def _common_beginning(head: Ids, ids: Ids, shares: bool = True) -> int:
    """Return how many of `ids` are those of `head`, or 0 where they are few or nothing is shared.

    The last is always its own, for a score is read there.
    """
    if not shares:
        return 0
    most = min(len(head), len(ids) - 1)
    differs = np.flatnonzero(head[:most] != ids[:most])
    common = int(differs[0]) if differs.size else max(most, 0)
    return common if common >= _LEAST_SHARED else 0


def _checksum(*columns: TokenizedRows) -> int:
    """Return the CRC-32 of all that decides a step."""
    checksum = 0
    for column in columns:
        for array in (column.ids, column.offsets, column.target_start, column.weight):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum
