"""Context parallelism: which places of a bin each rank of a group computes.

A bin is cut into twice as many equal slices as the group has ranks; rank r takes slice r and slice 2c - 1 - r. Later
places look back on more keys, so that a late slice beside an early one balances the ranks. Rows stay whole in their
positions: queries of a slice attend to keys of the same row from its first token on, wherever that was computed.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from offline_align.data.batch import AttentionSlice, PackedBatch

Bounds = npt.NDArray[np.int64]


def slices_of_rank(tokens: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Return where the slices of `rank` (of `size`) begin and end in a bin of `tokens`, in order."""
    width = tokens // (2 * size)
    assert width * 2 * size == tokens, "a bin must be padded to a multiple of twice the context parallel size"
    return [(n * width, (n + 1) * width) for n in (rank, 2 * size - 1 - rank)]


def share_of_context(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """Return what rank `rank` of `size` computes of a whole bin; the bin itself where `size` is 1.

    Targets belong to the rank that computes their place. Pairs belong to rank 0, for every rank gets all scores.
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
        last_index=ends.clamp(min=0),
        last_is_here=ends >= 0,
        margins=batch.margins if rank == 0 else batch.margins[:0],
    )


def _attention(bounds: Bounds, first: int, last: int) -> AttentionSlice:
    """Return the queries at places `first` to `last` and the keys that they see, row by row."""
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
