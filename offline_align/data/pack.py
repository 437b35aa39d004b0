"""Packing: assign rows to bins. This is pure arithmetic on lengths, with the same result on every rank.

Rows are packed within one optimizer step only. A step therefore always has exactly the rows of its
index, at any parallel layout, and packing has no state to save.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int, multiple_of: int = 1) -> list[list[int]]:
    """Return bins of row indices, each of at most `capacity` tokens, balanced by tokens.

    The number of bins is what first-fit-decreasing needs, rounded up to a multiple of `multiple_of`
    (data parallel ranks), and more if the balanced assignment does not fit. Rows go to the emptiest
    bin, longest first, so that ranks finish together. Some bins are empty if there are fewer rows
    than ranks. Bin `b` belongs to rank `b % multiple_of`. Raises ValueError for a row longer than
    `capacity`.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a row of {longest} tokens does not fit a bin of {capacity}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    needed = _first_fit_count([lengths[i] for i in order], capacity)
    bins = -(-max(needed, 1) // multiple_of) * multiple_of
    while (packed := _spread(order, lengths, capacity, bins)) is None:
        bins += multiple_of
    return packed


def _first_fit_count(decreasing: list[int], capacity: int) -> int:
    """Return the number of bins that first-fit needs for lengths in decreasing order."""
    room = np.zeros(len(decreasing) or 1, dtype=np.int64)
    used = 0
    for length in decreasing:
        fits = np.flatnonzero(room[:used] >= length)
        at = int(fits[0]) if fits.size else used
        if at == used:
            room[used] = capacity
            used += 1
        room[at] -= length
    return used


def _spread(order: list[int], lengths: Sequence[int], capacity: int, count: int) -> list[list[int]] | None:
    """Assign each row to the emptiest bin; return None if a bin overflows."""
    load = np.zeros(count, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        at = int(load.argmin())
        if load[at] + lengths[i] > capacity:
            return None
        load[at] += lengths[i]
        bins[at].append(i)
    return bins


def padding_multiple(tensor: int, context: int, sequence_parallel: bool, fp8: bool = False) -> int:
    """Return the multiple to which bins are padded: equal parts for ranks, 16 for fp8 products."""
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1) * (16 if fp8 else 1)
