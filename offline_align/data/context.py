"""Context parallelism: the positions of a bin that each rank of a group computes.

A bin is cut into 2c equal slices for a group of c ranks; rank r takes slices r and 2c - 1 - r.
Later positions attend to more keys, so pairing a late slice with an early one balances the ranks.
Positions still count from the start of each row, and queries attend to all earlier keys of their
row, whichever rank computes them.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from offline_align.data.batch import AttentionSlice, PackedBatch

Bounds = npt.NDArray[np.int64]


def slices_of_rank(tokens: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return the bounds of the two slices of `rank` (of `size`) in a bin of `tokens`, in order."""
    width = tokens // (2 * size)
    assert width * 2 * size == tokens, "a bin must be padded to a multiple of twice the context parallel size"
    return [(n * width, (n + 1) * width) for n in (rank, 2 * size - 1 - rank)]


def share_of_context(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """Return the part of a bin that rank `rank` of `size` computes; the bin itself if `size` is 1.

    A target belongs to the rank that computes its position. Pairs belong to rank 0, because every
    rank gets all scores.
    """
    if size == 1:
        return batch
    bounds = slices_of_rank(batch.tokens.size(1), rank, size)
    places = torch.cat([torch.arange(first, last) for first, last in bounds])
    local = torch.full((batch.tokens.size(1),), -1, dtype=torch.int64)
    local[places] = torch.arange(len(places))
    targets = local[batch.target_index] >= 0
    ends = local[batch.last_index]
    return replace(
        batch,
        tokens=batch.tokens[:, places],
        positions=batch.positions[:, places],
        slices=tuple(_attention(batch.cu_seqlens.numpy().astype(np.int64), first, last) for first, last in bounds),
        target_index=local[batch.target_index][targets],
        target_ids=batch.target_ids[targets],
        target_weights=batch.target_weights[targets],
        target_counts=_counts(batch, targets),
        last_index=ends.clamp(min=0),
        last_is_here=ends >= 0,
        margins=batch.margins if rank == 0 else batch.margins[:0],
        rollout=None if batch.rollout is None else batch.rollout.each(lambda column: column[targets]),
        target_is_here=targets,
    )


def _counts(batch: PackedBatch, chosen: torch.Tensor) -> torch.Tensor:
    """Return the number of targets of each segment among those that `chosen` [N] selects."""
    segment = torch.repeat_interleave(batch.target_counts)
    return torch.bincount(segment[chosen], minlength=batch.target_counts.numel())


def _attention(bounds: Bounds, first: int, last: int) -> AttentionSlice:
    """Return the queries at positions `first` to `last` and the keys they attend to, row by row."""
    rows = np.flatnonzero((bounds[1:] > first) & (bounds[:-1] < last))
    starts, ends = bounds[:-1][rows], np.minimum(bounds[1:][rows], last)
    queries = np.append(np.maximum(starts, first), last) - first
    keys = np.append(starts, last) - starts[0]
    return AttentionSlice(
        key_range=(int(starts[0]), last),
        cu_seqlens_q=torch.from_numpy(queries.astype(np.int32)),
        cu_seqlens_k=torch.from_numpy(keys.astype(np.int32)),
        max_seqlen_q=int(np.diff(queries).max()),
        max_seqlen_k=int(np.max(ends - starts)),
    )
