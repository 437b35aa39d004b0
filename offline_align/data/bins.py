"""Sources of tokenised rows (samples or pairs), and the bins that they are packed into.

A bin is a sequence of packed rows that one forward pass takes. Adjacent rows of a bin with the same
prompt can share it: the first row contains the prompt, and the others attend to its tokens. The
result does not change, because in a causal model a token never depends on later tokens.
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
import numpy.typing as npt

from offline_align.config.sections import ComputeSection, ParallelSection
from offline_align.data.batch import PackedBatch
from offline_align.data.collate import Ids, Indices, Segment, Targets, assemble
from offline_align.data.mixture import Mixture
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows

# Common prefixes of fewer tokens are not shared, because sharing would cost more than it saves.
_LEAST_SHARED = 16

MOST_KEYS_IN_TRAINING = 4.0
"""Maximum number of attended keys per computed token in a prefix group.

In training, the keys of every row are kept for the backward pass, so without this limit memory would
grow with the number of answers. With it, sharing saves at most three quarters of the tokens.
"""


def shares_prompts(trainer: ComputeSection, parallel: ParallelSection) -> bool:
    """Return whether rows of a bin share a common prompt. With context parallelism, bins have complete rows."""
    return trainer.share_prompts and parallel.context_parallel_size == 1


@dataclass(frozen=True)
class BinSize:
    """The cost of a bin."""

    tokens: int
    """Computed tokens, without padding."""
    squared_lengths: int
    """Twice the number of (query, key) pairs in causal attention."""


class PrefixGroup:
    """Rows that share one prompt. The first row contains it, and the others attend to it.

    `sequences` are the sequences of the first row: one for a sample, two for a pair. If `shares` is
    false, nothing is shared, not even between the two sequences of a pair.
    """

    def __init__(self, prompt: bytes, row: int, sequences: Sequence[Ids], shares: bool) -> None:
        self.prompt = prompt
        """The common prompt; if it is empty, no other row can join."""
        self.rows = [row]
        self._head, *others = sequences
        self.sequences = [(self._head, 0), *((ids, _shared_prefix(self._head, ids, shares)) for ids in others)]
        """The ids of each sequence, and the length of the prefix it shares with the first one."""
        self.tokens, self._keys, self.squared_lengths = _costs(self.sequences)

    def joined_by(self, row: int, sequences: Sequence[Ids], capacity: float, most_keys: float) -> bool:
        """Add `row` if the group stays within `capacity` and `most_keys`; return whether it was added.

        `capacity` is in tokens, `most_keys` in attended keys per computed token.
        """
        added = [(ids, _shared_prefix(self._head, ids)) for ids in sequences]
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
        """Yield the segments of the group; `first` is the number of the first one in the bin."""
        for number, (ids, shared) in enumerate(self.sequences, first):
            yield Segment(ids, first if shared else number, shared)


def _costs(sequences: Sequence[tuple[Ids, int]]) -> tuple[int, int, int]:
    """Return the computed tokens, the attended keys and the squared lengths (see `BinSize`)."""
    tokens = keys = squared_lengths = 0
    for ids, shared in sequences:
        length = len(ids)
        tokens, keys = tokens + length - shared, keys + length
        squared_lengths += length * length - shared * shared
    return tokens, keys, squared_lengths


class RowSource(ABC):
    """Tokenised rows to pack. A sample has one sequence, a pair has two.

    If `share_prompts` is set, rows with the same prompt share it, up to `most_keys` attended keys per
    computed token. The prompts are read from `prompted`: the samples, or one side of the pairs.
    `mixture` says which rows an epoch draws; None if it has every row once.
    """

    mixture: Mixture | None = None

    def __init__(self, prompted: TokenizedRows, share_prompts: bool, most_keys: float) -> None:
        self._prompted, self.share_prompts, self.most_keys = prompted, share_prompts, most_keys

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._prompted)

    @property
    def epoch_rows(self) -> int:
        """Number of rows of an epoch."""
        return len(self) if self.mixture is None else self.mixture.epoch_rows

    @abstractmethod
    def num_tokens(self) -> int:
        """Return the number of tokens of all rows, each with its prompt."""

    @abstractmethod
    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""

    @abstractmethod
    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin of `rows`, padded to a multiple of `pad_to_multiple` tokens."""

    @property
    @abstractmethod
    def num_read(self) -> Indices:
        """Number of positions that the head reads for each row: [rows]."""

    @abstractmethod
    def _sequences(self, row: int) -> list[Ids]: ...

    def groups(self, rows: Sequence[int], capacity: int) -> list[PrefixGroup]:
        """Return `rows` in prefix groups of at most `capacity` tokens; packing treats a group as one unit.

        A single row may be longer than `capacity`.
        """
        found: list[PrefixGroup] = []
        latest: dict[bytes, PrefixGroup] = {}
        for row in rows:
            prompt = self._shared_prompt(row)
            group = latest.get(prompt)
            if group is None or not self._join(group, row, capacity):
                latest[prompt] = self._begin(prompt, row)
                found.append(latest[prompt])
        return found

    def size(self, rows: Sequence[int]) -> BinSize:
        """Return the cost of a bin of `rows`."""
        groups = self._prefix_groups(rows)
        return BinSize(sum(f.tokens for f in groups), sum(f.squared_lengths for f in groups))

    def size_of_groups(self, groups: Sequence[PrefixGroup]) -> BinSize:
        """Return the cost of a bin of `groups`, which come from this source."""
        # `collate` has no token limit on a group, so it merges adjacent groups with the same prompt.
        if any(left.prompt and left.prompt == right.prompt for left, right in pairwise(groups)):
            return self.size([row for group in groups for row in group.rows])
        return BinSize(sum(g.tokens for g in groups), sum(g.squared_lengths for g in groups))

    @cached_property
    def prompts(self) -> Indices:
        """Prompt number of each row, shape [rows]. Rows with the same prompt have the same number."""
        numbers: dict[bytes, int] = {}
        # Keys are digests, because the prompts of a million rows would take gigabytes.
        digests = (hashlib.blake2b(self._prompt(row), digest_size=16).digest() for row in range(len(self)))
        return np.fromiter((numbers.setdefault(d, len(numbers)) for d in digests), np.int64, len(self))

    def repeated_share(self) -> float:
        """Return the fraction of all tokens that repeat the prompt of an earlier row."""
        lengths = self._prompted.prompt_length
        _, first = np.unique(self.prompts, return_index=True)
        return float(lengths.sum() - lengths[first].sum()) / self.num_tokens()

    def _prompt(self, row: int) -> Ids:
        """Return the ids before the condition and the response."""
        begin = self._prompted.offsets[row]
        return self._prompted.ids[begin : begin + self._prompted.prompt_length[row]]

    def _segments(self, rows: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        for group in self._prefix_groups(rows):
            segments += group.segments(len(segments))
        return segments

    def _prefix_groups(self, rows: Sequence[int]) -> list[PrefixGroup]:
        """Return the rows of a bin as groups of adjacent rows that share a prompt."""
        found: list[PrefixGroup] = []
        for row in rows:
            prompt = self._shared_prompt(row)
            last = found[-1] if found else None
            if last is None or last.prompt != prompt or not self._join(last, row, math.inf):
                found.append(self._begin(prompt, row))
        return found

    def _shared_prompt(self, row: int) -> bytes:
        """Return the prompt as bytes if it is worth sharing, else empty bytes."""
        if not self.share_prompts:
            return b""
        prompt = self._prompt(row)
        return prompt.tobytes() if len(prompt) >= _LEAST_SHARED else b""

    def _begin(self, prompt: bytes, row: int) -> PrefixGroup:
        return PrefixGroup(prompt, row, self._sequences(row), self.share_prompts)

    def _join(self, group: PrefixGroup, row: int, capacity: float) -> bool:
        return bool(group.prompt) and group.joined_by(row, self._sequences(row), capacity, self.most_keys)


class SampleSource(RowSource):
    """Tokenised samples: one segment per row. The weight of a row applies to all its targets."""

    def __init__(self, rows: TokenizedRows, share_prompts: bool = False, most_keys: float = math.inf) -> None:
        super().__init__(rows, share_prompts, most_keys)
        self.rows = rows

    def num_tokens(self) -> int:
        """Return the number of tokens of all rows, each with its prompt."""
        return int(self.rows.offsets[-1] - self.rows.offsets[0])

    def fingerprint(self) -> int:
        """Return a checksum of the rows and their order."""
        return _checksum(self.rows)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin of `rows` with all their targets."""
        targets = Targets(self.rows.target_start[list(rows)], self.rows.weight[list(rows)])
        row_ids = [self.rows.row_ids[row] for row in rows]
        return assemble(self._segments(rows), row_ids, targets, np.zeros(0, np.float32), pad_to_multiple)

    @cached_property
    def num_read(self) -> Indices:
        """Number of targets of each row: [rows]."""
        return _num_targets(self.rows)

    def _sequences(self, row: int) -> list[Ids]:
        return [_ids(self.rows, row)]


class PairSource(RowSource):
    """Tokenised pairs: two segments per row, chosen first.

    A reward model scores each segment at its last token. If `with_targets` is set, the tokens of both
    answers are targets too, so that a policy can compute their likelihoods. `reference` [pairs, 2] has
    the log-likelihoods of both answers of each pair at the start of the run.
    """

    def __init__(
        self,
        pairs: TokenizedPairs,
        share_prompts: bool = False,
        most_keys: float = math.inf,
        *,
        with_targets: bool = False,
        reference: npt.NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__(pairs.chosen, share_prompts, most_keys)
        self.pairs, self.with_targets, self.reference = pairs, with_targets, reference

    def num_tokens(self) -> int:
        """Return the number of tokens of all pairs. If prompts are shared, each pair counts its prompt once."""
        both = sum(int(side.offsets[-1] - side.offsets[0]) for side in (self.pairs.chosen, self.pairs.rejected))
        return both - (int(self.pairs.chosen.prompt_length.sum()) if self.share_prompts else 0)

    def fingerprint(self) -> int:
        """Return a checksum of the pairs and their order."""
        return _checksum(self.pairs.chosen, self.pairs.rejected)

    def collate(self, rows: Sequence[int], pad_to_multiple: int) -> PackedBatch:
        """Return the bin of both answers of each pair of `rows`."""
        margins = np.nan_to_num(self.pairs.margin[list(rows)], nan=0.0).astype(np.float32)
        row_ids = [self.pairs.row_ids[row] for row in rows]
        targets = self._targets(list(rows)) if self.with_targets else None
        return assemble(self._segments(rows), row_ids, targets, margins, pad_to_multiple)

    def _targets(self, rows: list[int]) -> Targets:
        """Return the targets of the segments of `rows`, in the order chosen, rejected, chosen, ..."""
        sides = (self.pairs.chosen, self.pairs.rejected)
        start = np.stack([side.target_start[rows] for side in sides], axis=1)
        weight = np.stack([side.weight[rows] for side in sides], axis=1)
        reference = None if self.reference is None else self.reference[rows].reshape(-1)
        return Targets(start.reshape(-1), weight.reshape(-1), reference)

    @cached_property
    def num_read(self) -> Indices:
        """Number of targets of both answers, or 2 for a reward model: [pairs]."""
        if not self.with_targets:
            return np.full(len(self), 2, np.int64)
        return _num_targets(self.pairs.chosen) + _num_targets(self.pairs.rejected)

    def with_reference(self, reference: npt.NDArray[np.float64]) -> "PairSource":
        """Return the same pairs with the log-likelihoods [pairs, 2] of their answers at the start of the run."""
        source = PairSource(
            self.pairs, self.share_prompts, self.most_keys, with_targets=self.with_targets, reference=reference
        )
        source.mixture = self.mixture
        return source

    def _sequences(self, row: int) -> list[Ids]:
        return [_ids(self.pairs.chosen, row), _ids(self.pairs.rejected, row)]


def _num_targets(rows: TokenizedRows) -> Indices:
    lengths: Indices = rows.offsets[1:] - rows.offsets[:-1]
    return lengths - rows.target_start


def _ids(rows: TokenizedRows, row: int) -> Ids:
    return rows.ids[rows.offsets[row] : rows.offsets[row + 1]]


def _shared_prefix(head: Ids, ids: Ids, shares: bool = True) -> int:
    """Return the length of the prefix that `ids` shares with `head`; 0 if it is short or `shares` is false.

    The last token is never shared, because a score is read there.
    """
    if not shares:
        return 0
    most = min(len(head), len(ids) - 1)
    differs = np.flatnonzero(head[:most] != ids[:most])
    common = int(differs[0]) if differs.size else max(most, 0)
    return common if common >= _LEAST_SHARED else 0


def _checksum(*columns: TokenizedRows) -> int:
    """Return the CRC-32 of everything in the rows that determines a step."""
    checksum = 0
    for column in columns:
        for array in (column.ids, column.offsets, column.target_start, column.weight):
            checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum
