"""Order of rows, batches compared with values worked out by hand, and independence of ranks."""

from itertools import pairwise

import numpy as np
import pytest

from offline_align.data.bins import PairSource, SampleSource
from offline_align.data.loader import Loader, epoch_order, order_by_prompt, rows_of_step
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows


def tokenized(rows: list[list[int]], starts: list[int], weights: list[float] | None = None) -> TokenizedRows:
    return TokenizedRows(
        ids=np.array([i for r in rows for i in r], dtype=np.int32),
        offsets=np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64),
        target_start=np.array(starts, dtype=np.int32),
        weight=np.array(weights or [1.0] * len(rows), dtype=np.float32),
        row_ids=[f"r{i}" for i in range(len(rows))],
        dropped={},
        truncated=0,
    )


def many(count: int) -> SampleSource:
    return SampleSource(tokenized([[i] * (3 + i % 7) for i in range(count)], [1] * count))


def test_two_rows_by_hand() -> None:
    source = SampleSource(tokenized([[10, 11, 12, 13], [20, 21, 22]], [2, 1], [1.0, 0.5]))
    batch = source.collate([0, 1], pad_to_multiple=8)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 20, 21, 22, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.target_index.tolist() == [1, 2, 4, 5]
    assert batch.target_ids.tolist() == [12, 13, 21, 22]
    assert batch.target_weights.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert batch.last_index.tolist() == [3, 6]
    assert (batch.num_padding, batch.max_seqlen, batch.row_ids) == (1, 4, ("r0", "r1"))


def test_a_pair_is_two_neighbouring_segments() -> None:
    chosen, rejected = tokenized([[1, 2, 3], [4, 5]], [1, 1]), tokenized([[1, 9], [4, 8, 7]], [1, 1])
    pairs = TokenizedPairs(chosen, rejected, np.array([np.nan, 0.5], dtype=np.float32), ["p0", "p1"], {})
    batch = PairSource(pairs).collate([1, 0], pad_to_multiple=1)
    assert batch.tokens.tolist() == [[4, 5, 4, 8, 7, 1, 2, 3, 1, 9]]
    assert batch.last_index.tolist() == [1, 4, 7, 9]
    assert batch.margins.tolist() == [0.5, 0.0]
    assert batch.target_index.numel() == 0


def test_an_empty_bin_has_one_padding_segment() -> None:
    batch = many(3).collate([], pad_to_multiple=2)
    assert batch.tokens.tolist() == [[0, 0]]
    assert batch.target_index.numel() == batch.last_index.numel() == 0


def test_each_row_comes_once_in_an_epoch_and_epochs_differ() -> None:
    first, second = epoch_order(50, 1, 0), epoch_order(50, 1, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_steps_count_samples_on_through_epochs(batch: int) -> None:
    steps = -(-75 // batch)
    seen = [i for s in range(steps) for i in rows_of_step(s, batch, 25, 75, 3)]
    assert seen == [int(i) for e in range(3) for i in epoch_order(25, 3, e)]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_ranks_share_a_step_without_overlap(dp_size: int) -> None:
    loaders = [Loader(many(40), 12, 40, 16, 5, r, dp_size) for r in range(dp_size)]
    for step in range(loaders[0].total_steps):
        shares = [loader.step(step) for loader in loaders]
        ids = [i for s in shares for b in s.micro_batches for i in b.row_ids]
        expected = [f"r{i}" for i in rows_of_step(step, 12, 40, 40, 5)]
        assert sorted(ids) == sorted(expected)
        assert len({len(s.micro_batches) for s in shares}) == 1
        assert {s.num_rows for s in shares} == {len(expected)}


def test_the_last_step_may_be_short() -> None:
    loader = Loader(many(10), 4, 10, 64, 0, 0, 1)
    assert [loader.step(s).num_rows for s in range(loader.total_steps)] == [4, 4, 2]


def test_padding_is_counted_over_all_ranks() -> None:
    data = Loader(many(9), 9, 9, 32, 0, 0, 2, pad_to_multiple=4).step(0)
    other = Loader(many(9), 9, 9, 32, 0, 1, 2, pad_to_multiple=4).step(0)
    computed = sum(b.tokens.numel() for d in (data, other) for b in d.micro_batches)
    assert data.num_tokens + data.num_padding == computed


def test_validation_sees_every_row_once() -> None:
    loaders = [Loader(many(23), 1, 23, 30, 0, r, 2) for r in range(2)]
    seen = [i for loader in loaders for d in loader.in_order(5) for b in d.micro_batches for i in b.row_ids]
    assert sorted(seen) == sorted(f"r{i}" for i in range(23))


def test_prefetched_steps_are_the_steps_themselves() -> None:
    loader = Loader(many(50), 8, 100, 64, seed=3, dp_rank=1, dp_size=2)
    ahead = [data.micro_batches[0].row_ids for data in loader.steps(4)]
    assert ahead == [loader.step(n).micro_batches[0].row_ids for n in range(4, loader.total_steps)]


@pytest.mark.parametrize("rows", [64, 50])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_a_run_stopped_anywhere_goes_on_with_the_same_rows(rows: int, before: int, after: int) -> None:
    """For three epochs and another number of ranks, each step has the same ids, each once per epoch."""

    def ids(step: int, dp_size: int) -> list[str]:
        shares = [Loader(source, 4, 3 * rows, 32, 9, rank, dp_size).step(step) for rank in range(dp_size)]
        return sorted(row for share in shares for batch in share.micro_batches for row in batch.row_ids)

    source = many(rows)
    steps = Loader(source, 4, 3 * rows, 32, 9, 0, 1).total_steps
    straight = {dp_size: [ids(step, dp_size) for step in range(steps)] for dp_size in {1, before, after}}
    for stop in range(steps + 1):
        assert straight[before][:stop] + straight[after][stop:] == straight[1]
    order = [f"r{i}" for step in range(steps) for i in rows_of_step(step, 4, rows, 3 * rows, 9)]
    for epoch in range(3):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == sorted(f"r{i}" for i in range(rows))


def answers(rows: int, prompts: int, share: bool) -> SampleSource:
    """Return rows of 20 prompt tokens and 1 to 5 answer tokens, whose prompts alternate."""
    ids = [[1000 + i % prompts] * 20 + [i] * (1 + i % 5) for i in range(rows)]
    return SampleSource(tokenized(ids, [20] * rows), share)


def test_rows_of_a_prompt_move_to_the_position_of_the_first() -> None:
    source = answers(30, 7, share=True)
    for epoch in range(2):
        order = order_by_prompt(source, 3, epoch).tolist()
        assert sorted(order) == list(range(30))
        prompts = [row % 7 for row in order]
        met = list(dict.fromkeys(prompts))
        assert prompts == sorted(prompts, key=met.index)
        assert met == list(dict.fromkeys(int(row) % 7 for row in epoch_order(30, 3, epoch)))
    assert order_by_prompt(source, 3, 0).tolist() != order_by_prompt(source, 3, 1).tolist()


def test_a_step_goes_by_prompts_and_a_run_continues_anywhere() -> None:
    source = answers(30, 7, share=True)
    loader = Loader(source, 8, 60, 64, 3, 0, 1, by_prompt=True)
    seen = [sorted(i for b in loader.step(step).micro_batches for i in b.row_ids) for step in range(8)]
    order = [f"r{i}" for epoch in range(2) for i in order_by_prompt(source, 3, epoch)]
    assert seen == [sorted(order[at : at + 8]) for at in range(0, 60, 8)]


@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_what_a_step_says_is_what_its_ranks_compute(dp_size: int, by_prompt: bool) -> None:
    source = answers(40, 4, share=True)
    for step in range(4):
        loaders = [Loader(source, 12, 40, 64, 5, r, dp_size, 4, by_prompt=by_prompt) for r in range(dp_size)]
        shares = [loader.step(step) for loader in loaders]
        assert len({len(share.micro_batches) for share in shares}) == 1
        batches = [b for share in shares for b in share.micro_batches]
        computed = sum(b.tokens.numel() for b in batches)
        assert {share.num_tokens + share.num_padding for share in shares} == {computed}
        assert {share.num_padding for share in shares} == {sum(b.num_padding for b in batches)}
        positions = [b.positions[0, : b.tokens.numel() - b.num_padding] for b in batches]
        # A token at position p attends to p + 1 keys; twice their sum over a row of n tokens is n^2 + n.
        seen = sum(int((2 * p + 1).sum()) for p in positions)
        assert {share.squared_lengths for share in shares} == {seen}


def test_ranks_finish_together_even_if_one_prompt_has_all_the_answers() -> None:
    source = answers(16, 1, share=True)
    shares = [Loader(source, 16, 16, 4096, 0, r, 4, by_prompt=True).step(0).micro_batches for r in range(4)]
    tokens = [sum(b.tokens.numel() for b in share) for share in shares]
    assert max(tokens) <= 1.5 * min(tokens)
    assert sum(tokens) < sum(len(source.rows.ids[a:b]) for a, b in pairwise(source.rows.offsets))


def test_the_order_does_not_depend_on_what_was_drawn_before() -> None:
    def order() -> list[int]:
        epoch_order.cache_clear()
        return [int(i) for epoch in (2, 0, 1) for i in epoch_order(64, 3, epoch)]

    first = order()
    np.random.seed(1)
    np.random.permutation(1000)
    assert order() == first
