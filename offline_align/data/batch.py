"""One packed micro-batch, ready for the model.

Shape legend: T tokens of the bin, S segments (rows) in it, N target tokens, P pairs. Under context
parallelism a rank holds its slices of the bin: T and N count its own tokens, S counts the whole
bin.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSlice:
    """Contiguous queries of a bin and the keys they attend to, row by row.

    The queries of a row are aligned with the last of its keys.
    """

    key_range: tuple[int, int]
    """First and last (exclusive) position of the keys in the bin, or among the K keys of `SharedKeys`."""
    cu_seqlens_q: Tensor
    """[rows + 1] int32: boundaries of the queries of each row."""
    cu_seqlens_k: Tensor
    """[rows + 1] int32: boundaries of the keys of each row, relative to the start of `key_range`."""
    max_seqlen_q: int
    max_seqlen_k: int

    def each(self, change: Callable[[Tensor], Tensor]) -> "AttentionSlice":
        """Return the slice with `change` applied to its tensors."""
        return replace(self, cu_seqlens_q=change(self.cu_seqlens_q), cu_seqlens_k=change(self.cu_seqlens_k))


@dataclass(frozen=True)
class SharedKeys:
    """The keys of all rows when some rows start with tokens of an earlier row, which the bin holds once.

    The K keys of all rows are concatenated; R of them repeat keys of an earlier row.
    """

    index: Tensor
    """[K] int64: position in the bin of each key."""
    own: Tensor
    """[T] int64: position among the K keys of each token's own key."""
    again: Tensor
    """[R] int64: positions among the K keys of those that repeat an earlier row's keys."""
    again_index: Tensor
    """[R] int64: positions in the bin of these repeated keys."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "SharedKeys":
        """Return a copy with `change` applied to all tensors."""
        return SharedKeys(*(change(t) for t in (self.index, self.own, self.again, self.again_index)))


@dataclass(frozen=True)
class RolloutTargets:
    """Numbers for each target of the policy's own answers: [N] fp32 each, in the order of the targets."""

    old_log_probs: Tensor
    """Log-probabilities in nats, by the trainer, under the policy that answered."""
    advantages: Tensor
    """Whitened advantages."""
    importance: Tensor
    """Weights of the policy's loss, which correct for the numerics of the generation engine."""
    old_values: Tensor
    """The critic's values before the iteration, in normalised reward."""
    returns: Tensor
    """What the critic learns to predict, in normalised reward."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "RolloutTargets":
        """Return a copy with `change` applied to all tensors."""
        return RolloutTargets(**{name: change(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class PackedBatch:
    """A bin of concatenated rows; attention never crosses from one row into another."""

    tokens: Tensor
    """[1, T] int64."""
    positions: Tensor
    """[1, T] int64, counted from 0 at the first token of each row."""
    cu_seqlens: Tensor
    """[S + 1] int32: boundaries of the segments in the whole bin."""
    max_seqlen: int
    """Tokens of the longest segment, that is, of a row without its shared prefix."""
    target_index: Tensor
    """[N] int64: positions in `tokens` whose next token is a target."""
    target_ids: Tensor
    """[N] int64: the target tokens."""
    target_weights: Tensor
    """[N] fp32: weight of the row of each target (Eq. 4 and 5; 1 for other methods)."""
    target_counts: Tensor
    """[S] int64: number of targets of each segment. The targets are in the order of the segments."""
    last_index: Tensor
    """[S] int64: position in `tokens` of the last token of each segment, where a reward is read."""
    margins: Tensor
    """[P] fp32: margin of each pair (segments 2p and 2p + 1 are chosen and rejected); 0 if it has none."""
    row_ids: tuple[str, ...]
    """Ids of the rows (or pairs) in the bin."""
    num_padding: int
    """Tokens of the bin that belong to no row."""
    slices: tuple[AttentionSlice, ...] = ()
    """Queries of this rank and their keys, under context parallelism or with shared keys; else empty."""
    shared_keys: SharedKeys | None = None
    """Keys that rows share with earlier rows; None if no row shares any."""
    last_is_here: Tensor | None = None
    """[S] bool: whether the last token of a segment is on this rank; None if all are."""
    reference: Tensor | None = None
    """[S] fp64: log-likelihood in nats of the targets of each segment under the weights at the start of
    the run; None if the objective does not need it."""
    rollout: RolloutTargets | None = None
    """Numbers for each target of the policy's own answers; None if the objective does not need them."""
    target_is_here: Tensor | None = None
    """[targets of the whole bin] bool: whether each of them is on this rank; None if all are."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        if device.type == "cpu":
            return self
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> "PackedBatch":
        """Return the batch in pinned memory, so that copies to the GPU are asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        shared = None if self.shared_keys is None else self.shared_keys.each(change)
        rollout = None if self.rollout is None else self.rollout.each(change)
        slices = tuple(s.each(change) for s in self.slices)
        return replace(self, slices=slices, shared_keys=shared, rollout=rollout, **tensors)
