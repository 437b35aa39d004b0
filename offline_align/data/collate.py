"""Collate rows into a bin: concatenated tokens, and the keys that rows share.

Shape legend: S segments (rows of a bin, two for a pair), T tokens of the bin, K keys of its rows, N
targets.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offline_align.data.batch import AttentionSlice, PackedBatch, SharedKeys

Indices = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """A row of a bin."""

    ids: Ids
    """The whole row."""
    head: int
    """Number of the segment that contains the shared prefix; the segment's own number if it shares none."""
    shared: int
    """Length of the shared prefix in tokens."""


@dataclass(frozen=True)
class Targets:
    """For each segment, the position of its first target and the weight of its targets."""

    start: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]
    reference: npt.NDArray[np.float64] | None = None
    """Log-likelihood of the targets of each segment at the start of the run, in nats."""


def assemble(
    segments: list[Segment],
    row_ids: list[str],
    targets: Targets | None,
    margins: npt.NDArray[np.float32],
    multiple: int,
) -> PackedBatch:
    """Concatenate the segments' own tokens and pad them to a multiple of `multiple` tokens."""
    own = [s.ids[s.shared :] for s in segments]
    total = sum(map(len, own))
    # A rank without rows still takes part in collectives, with one padding segment that is never read.
    padding = -total % multiple if total else multiple
    if padding:
        own.append(np.zeros(padding, dtype=np.int32))
    tokens = np.concatenate(own).astype(np.int64)
    lengths = np.array([len(ids) for ids in own])
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    shared = np.array([s.shared for s in segments] + [0] * (len(own) - len(segments)))
    positions = np.arange(len(tokens)) + np.repeat(shared - bounds[:-1], lengths)
    index, ids, weights, counts = _places(segments, targets, bounds)
    reference = None if targets is None or targets.reference is None else torch.from_numpy(targets.reference)
    keys, attention = _shared_keys(segments, bounds) if shared.any() else (None, ())
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        target_index=torch.from_numpy(index),
        target_ids=torch.from_numpy(ids),
        target_weights=torch.from_numpy(weights),
        target_counts=torch.from_numpy(counts),
        last_index=torch.from_numpy(bounds[1 : len(segments) + 1] - 1),
        margins=torch.from_numpy(margins),
        row_ids=tuple(row_ids),
        num_padding=padding,
        slices=attention,
        shared_keys=keys,
        reference=reference,
    )


def _places(
    segments: list[Segment], targets: Targets | None, bounds: Indices
) -> tuple[Indices, Indices, npt.NDArray[np.float32], Indices]:
    """Return the positions whose next token is a target, the target ids and their weights, each [N].

    The last array [S] has the number of targets of each segment.
    """
    if targets is None or not segments:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0, np.float32), np.zeros(len(segments), np.int64)
    starts = targets.start.tolist()
    counts = np.array([len(s.ids) - start for s, start in zip(segments, starts, strict=True)], np.int64)
    ids = np.concatenate([s.ids[start:] for s, start in zip(segments, starts, strict=True)]).astype(np.int64)
    first = np.repeat(targets.start.astype(np.int64) - np.cumsum(counts) + counts, counts)
    before = np.arange(counts.sum()) + first - 1
    number = np.repeat(np.arange(len(segments)), counts)
    shared, heads = np.array([s.shared for s in segments])[number], np.array([s.head for s in segments])[number]
    places = np.where(before < shared, bounds[heads] + before, bounds[number] + before - shared)
    return places.astype(np.int64), ids, np.repeat(targets.weight, counts).astype(np.float32), counts


def _shared_keys(segments: list[Segment], bounds: Indices) -> tuple[SharedKeys, tuple[AttentionSlice, ...]]:
    """Return the concatenated keys of all rows, and which of them the queries of each row attend to."""
    # A padding segment comes last and shares nothing.
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
