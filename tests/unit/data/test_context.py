"""Context parallelism: the ranks' shares add up to the bin, and queries attend to the right keys."""

import numpy as np
import pytest
import torch

from offline_align.data.batch import PackedBatch
from offline_align.data.bins import PairSource, SampleSource
from offline_align.data.context import share_of_context, slices_of_rank
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows

LENGTHS = [3, 17, 9, 1, 22, 4]


def tokenized(lengths: list[int]) -> TokenizedRows:
    ids = np.arange(sum(lengths), dtype=np.int32)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    starts, weights = np.minimum(lengths, 2).astype(np.int32), np.arange(1, len(lengths) + 1, dtype=np.float32)
    return TokenizedRows(ids, offsets, starts, weights, [str(n) for n in lengths], {}, 0)


def whole_bin(size: int) -> PackedBatch:
    return SampleSource(tokenized(LENGTHS)).collate(range(len(LENGTHS)), 2 * size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_make_up_the_bin(size: int) -> None:
    batch = whole_bin(size)
    shares = [share_of_context(batch, rank, size) for rank in range(size)]
    tokens = torch.cat([s.tokens for s in shares], dim=1)[0]
    assert sorted(tokens.tolist()) == sorted(batch.tokens[0].tolist())
    assert {s.tokens.size(1) for s in shares} == {batch.tokens.size(1) // size}
    # A target is the token after its position, whichever rank computes it.
    found = sorted(
        (int(s.tokens[0, i]), int(t), float(w))
        for s in shares
        for i, t, w in zip(s.target_index, s.target_ids, s.target_weights, strict=True)
    )
    assert [t for _, t, _ in found] == sorted(batch.target_ids.tolist())
    assert all(token + 1 == target for token, target, _ in found)
    assert sum(w for *_, w in found) == batch.target_weights.sum()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_query_sees_its_own_row_up_to_itself(size: int) -> None:
    batch = whole_bin(size)
    bounds = batch.cu_seqlens.tolist()
    for rank in range(size):
        share = share_of_context(batch, rank, size)
        seen = []
        for part in share.slices:
            q, k, first = part.cu_seqlens_q.tolist(), part.cu_seqlens_k.tolist(), part.key_range[0]
            assert k[-1] == part.key_range[1] - first
            assert part.max_seqlen_q == max(np.diff(q))
            assert part.max_seqlen_k == max(np.diff(k))
            for row in range(len(q) - 1):
                queries, keys = q[row + 1] - q[row], k[row + 1] - k[row]
                # The last query attends to all listed keys, the one before it to all but one.
                seen += [(first + k[row], first + k[row] + keys - queries + n) for n in range(queries)]
        places = [p for first, last in slices_of_rank(batch.tokens.size(1), rank, size) for p in range(first, last)]
        starts = [max(b for b in bounds if b <= p) for p in places]
        assert seen == list(zip(starts, places, strict=True))


def test_every_segment_ends_on_one_rank_and_pairs_belong_to_the_first() -> None:
    both = tokenized(LENGTHS)
    pairs = TokenizedPairs(both, both, np.ones(len(LENGTHS), np.float32), both.row_ids, {})
    batch = PairSource(pairs).collate(range(len(LENGTHS)), 4)
    shares = [share_of_context(batch, rank, 2) for rank in range(2)]
    here = torch.stack([s.last_is_here for s in shares if s.last_is_here is not None])
    assert here.sum(0).tolist() == [1] * (2 * len(LENGTHS))
    assert [s.margins.numel() for s in shares] == [len(LENGTHS), 0]
    for share in shares:
        assert share.last_is_here is not None
        own = share.tokens[0, share.last_index[share.last_is_here]]
        assert own.tolist() == batch.tokens[0, batch.last_index[share.last_is_here]].tolist()


def test_one_rank_computes_the_bin_itself() -> None:
    batch = whole_bin(1)
    assert share_of_context(batch, 0, 1) is batch
