"""One packed micro-batch, ready for the model.

Shape legend: T tokens of the bin, S segments (rows) in it, N target tokens, P pairs. Under context parallelism a rank
holds its slices of the bin: T and N are then its own, S is that of the whole bin.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSlice:
    """Neighbouring queries of a bin and the keys that they may see, row by row.

    Each row's queries are its last ones among the keys listed for it.
    """

    key_range: tuple[int, int]
    """First and last place (exclusive) of those keys in the whole bin, or among the keys of all rows if some share."""
    cu_seqlens_q: Tensor
    """[rows + 1] int32: where the queries of each row begin and end."""
    cu_seqlens_k: Tensor
    """[rows + 1] int32: the same of its keys, counted from the first of `key_range`."""
    max_seqlen_q: int
    max_seqlen_k: int

    def each(self, change: Callable[[Tensor], Tensor]) -> "AttentionSlice":
        """Return the slice with `change` made to its tensors."""
        return replace(self, cu_seqlens_q=change(self.cu_seqlens_q), cu_seqlens_k=change(self.cu_seqlens_k))


@dataclass(frozen=True)
class SharedKeys:
    """The keys of rows that begin with tokens of an earlier row, which the bin holds once.

    K keys of all rows stand side by side, R of them are of earlier rows.
    """

    index: Tensor
    """[K] int64: place in the bin of each key."""
    own: Tensor
    """[T] int64: which of the K is the token's own key, as its row sees it."""
    again: Tensor
    """[R] int64: which of the K are of an earlier row."""
    again_index: Tensor
    """[R] int64: places of those in the bin."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "SharedKeys":
        """Return the same with `change` made to all tensors."""
        return SharedKeys(*(change(t) for t in (self.index, self.own, self.again, self.again_index)))


@dataclass(frozen=True)
class PackedBatch:
    """A bin of whole rows side by side; attention never crosses a segment."""

    tokens: Tensor
    """[1, T] int64."""
    positions: Tensor
    """[1, T] int64, counted from 0 at the first token of each row."""
    cu_seqlens: Tensor
    """[S + 1] int32: where segments begin and end in the whole bin."""
    max_seqlen: int
    """Tokens of the longest segment: of a row without what it shares with an earlier one."""
    target_index: Tensor
    """[N] int64: places in `tokens` whose next token is a target."""
    target_ids: Tensor
    """[N] int64: those next tokens."""
    target_weights: Tensor
    """[N] fp32: weight of the row that each target belongs to (Eq. 4 and 5; 1 elsewhere)."""
    last_index: Tensor
    """[S] int64: place in `tokens` of the last token of each segment, where a reward is read."""
    margins: Tensor
    """[P] fp32: margin of each pair (segments 2p and 2p + 1 are chosen and rejected); 0 where it has none."""
    row_ids: tuple[str, ...]
    """Ids of the rows (or pairs) in the bin."""
    num_padding: int
    """Tokens of the bin that belong to no row."""
    slices: tuple[AttentionSlice, ...] = ()
    """What this rank computes of the bin under context parallelism, and what it looks back on; empty: whole rows."""
    shared_keys: SharedKeys | None = None
    """What rows see of earlier rows; None: nothing."""
    last_is_here: Tensor | None = None
    """[S] bool: whether the last token of a segment is on this rank; None: all are."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        if device.type == "cpu":
            return self
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> "PackedBatch":
        """Return the batch in pinned memory, from where a copy to the GPU does not hold up the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        shared = None if self.shared_keys is None else self.shared_keys.each(change)
        return replace(self, slices=tuple(s.each(change) for s in self.slices), shared_keys=shared, **tensors)
