"""Bins with shared prompts, compared with layouts written out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from offline_align.config.sections import ComputeSection, ParallelSection
from offline_align.data import bins
from offline_align.data.bins import BinSize, PairSource, RowSource, SampleSource, shares_prompts
from offline_align.data.tokenize import TokenizedPairs
from tests.unit.data.test_loader import tokenized

PROMPT = [7, 8, 9]


@pytest.fixture(autouse=True)
def short_prompts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bins, "_LEAST_SHARED", 3)


def pairs(chosen: list[list[int]], rejected: list[list[int]]) -> TokenizedPairs:
    starts = [1] * len(chosen)
    margin = np.full(len(chosen), np.nan, np.float32)
    names = [f"p{i}" for i in range(len(chosen))]
    return TokenizedPairs(tokenized(chosen, starts), tokenized(rejected, starts), margin, names, {})


def grouped(source: RowSource, capacity: int) -> list[tuple[list[int], int]]:
    return [(group.rows, group.tokens) for group in source.groups(range(len(source)), capacity)]


def test_a_pair_has_its_prompt_once() -> None:
    source = PairSource(pairs([[*PROMPT, 1, 2]], [[*PROMPT, 1, 5, 6]]), share_prompts=True)
    batch = source.collate([0], pad_to_multiple=8)
    # Both answers start with the same tokens, which are computed once as well.
    assert batch.tokens.tolist() == [[7, 8, 9, 1, 2, 5, 6, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 4, 5, 0]]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert batch.last_index.tolist() == [4, 6]
    (attention,) = batch.slices
    assert attention.cu_seqlens_q.tolist() == [0, 5, 7, 8]
    assert attention.cu_seqlens_k.tolist() == [0, 5, 11, 12]
    assert (attention.max_seqlen_q, attention.max_seqlen_k) == (5, 6)
    keys = batch.shared_keys
    assert keys is not None
    assert keys.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7]
    assert keys.own.tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert keys.again.tolist() == [5, 6, 7, 8]
    assert keys.again_index.tolist() == [0, 1, 2, 3]
    assert source.size([0]) == BinSize(7, 5**2 + 6**2 - 4**2)


def test_both_answers_of_a_pair_can_be_targets() -> None:
    """The targets are those of the same rows as samples, whether or not the bin shares their prompts."""
    chosen = tokenized([[*PROMPT, 1, 2], [*PROMPT, 3]], [3, 3])
    rejected = tokenized([[*PROMPT, 1, 5, 6], [4, 4]], [3, 1])
    rejected = replace(rejected, weight=np.array([2, 0.5], np.float32))
    tokens = TokenizedPairs(chosen, rejected, np.zeros(2, np.float32), ["a", "b"], {})
    source = PairSource(tokens, share_prompts=True, with_targets=True)
    batch = source.collate([1, 0], 1)
    assert batch.tokens.tolist() == [[*PROMPT, 3, 4, 4, 1, 2, 1, 5, 6]]
    assert batch.target_ids.tolist() == [3, 4, 1, 2, 1, 5, 6]
    assert batch.target_index.tolist() == [2, 4, 2, 6, 2, 8, 9]
    assert batch.target_weights.tolist() == [1, 0.5, 1, 1, 2, 2, 2]
    # Alone, the answers of pair "a" also share their first token, at position 3.
    alone = source.collate([0], 1)
    assert alone.tokens.tolist() == [[*PROMPT, 1, 2, 5, 6]]
    assert (alone.target_ids.tolist(), alone.target_index.tolist()) == ([1, 2, 1, 5, 6], [2, 3, 2, 3, 5])
    apart = PairSource(tokens, with_targets=True).collate([1, 0], 1)
    assert (apart.target_ids.tolist(), apart.target_index.tolist()) == ([3, 4, 1, 2, 1, 5, 6], [2, 4, 8, 9, 13, 14, 15])
    assert PairSource(tokens, share_prompts=True).collate([1, 0], 1).target_ids.numel() == 0
    empty = PairSource(tokens, with_targets=True).collate([], 4)
    assert (empty.target_ids.numel(), empty.last_index.numel(), empty.num_padding) == (0, 0, 4)


def test_each_pair_attends_only_to_its_own_prompt() -> None:
    source = PairSource(pairs([[*PROMPT, 1], [*PROMPT, 2]], [[*PROMPT, 3], [4, 4]]), share_prompts=True)
    batch = source.collate([1, 0], pad_to_multiple=1)
    assert batch.tokens.tolist() == [[*PROMPT, 2, 4, 4, *PROMPT, 1, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 3]]
    assert batch.last_index.tolist() == [3, 5, 9, 10]
    assert batch.shared_keys is not None
    assert batch.shared_keys.again_index.tolist() == [6, 7, 8]
    assert [source.size([row]).tokens for row in (1, 0)] == [6, 5]


@pytest.mark.parametrize("rejected", [[*PROMPT, 1, 2], [*PROMPT, 1], [*PROMPT, 1, 2, 3]])
def test_an_answer_always_has_a_last_token_of_its_own(rejected: list[int]) -> None:
    batch = PairSource(pairs([[*PROMPT, 1, 2]], [rejected]), share_prompts=True).collate([0], 1)
    chosen, other = batch.last_index.tolist()
    assert chosen < other == batch.tokens.numel() - 1
    assert batch.positions[0, other] == len(rejected) - 1


def test_short_prefixes_are_not_shared_and_sharing_can_be_off() -> None:
    short = PairSource(pairs([[7, 8, 1]], [[7, 8, 2]]), share_prompts=True)
    unwanted = PairSource(pairs([[*PROMPT, 1]], [[*PROMPT, 2]]))
    for source, tokens in ((short, 6), (unwanted, 8)):
        batch = source.collate([0], 1)
        assert (batch.shared_keys, batch.slices) == (None, ())
        assert batch.tokens.numel() == source.size([0]).tokens == tokens


def test_targets_of_rows_that_begin_alike() -> None:
    rows = tokenized([[*PROMPT, 1, 2], [*PROMPT, 1, 5]], [3, 3], [1.0, 0.5])
    batch = SampleSource(rows, share_prompts=True).collate([0, 1], 1)
    assert batch.tokens.tolist() == [[*PROMPT, 1, 2, 5]]
    # The second row's first target follows the prompt, its second follows the shared first answer token.
    assert batch.target_index.tolist() == [2, 3, 2, 3]
    assert batch.target_ids.tolist() == [1, 2, 1, 5]
    assert batch.target_weights.tolist() == [1.0, 1.0, 0.5, 0.5]


def test_answers_to_one_prompt_are_a_group_as_far_as_they_fit() -> None:
    other = [5, 5, 5]
    rows = [[*PROMPT, 1], [*other, 1], [*PROMPT, 2, 2], [*PROMPT, 3], [*other, 2]]
    source = SampleSource(tokenized(rows, [3] * 5), share_prompts=True)
    assert grouped(source, 100) == [([0, 2, 3], 7), ([1, 4], 5)]
    assert grouped(source, 6) == [([0, 2], 6), ([1, 4], 5), ([3], 4)]
    assert source.collate([0, 2, 3], 1).tokens.numel() == 7
    alone = SampleSource(source.rows)
    assert grouped(alone, 100) == [([i], len(row)) for i, row in enumerate(rows)]


def test_answers_under_conditions_have_their_prompt_in_common() -> None:
    """Conditional Alignment writes the reward after the prompt; it is not part of the shared prompt."""
    rows = tokenized([[*PROMPT, 50, 1], [*PROMPT, 51, 52, 2], [*PROMPT, 50, 3]], [4, 5, 4])
    source = SampleSource(replace(rows, condition_length=np.array([1, 2, 1], np.int32)), share_prompts=True)
    assert grouped(source, 100) == [([0, 1, 2], 9)]
    batch = source.collate([0, 1, 2], 1)
    # The third row also shares the condition of the first.
    assert batch.tokens.tolist() == [[*PROMPT, 50, 1, 51, 52, 2, 3]]
    assert batch.target_index.tolist() == [3, 6, 3]
    assert batch.target_ids.tolist() == [1, 2, 3]
    assert source.prompts.tolist() == [0, 0, 0]


def test_pairs_of_one_prompt_share_the_prompt_of_the_first() -> None:
    chosen, rejected = tokenized([[*PROMPT, 1], [*PROMPT, 2]], [3, 3]), tokenized([[*PROMPT, 3], [*PROMPT, 4]], [3, 3])
    margin = np.zeros(2, np.float32)
    source = PairSource(TokenizedPairs(chosen, rejected, margin, ["p0", "p1"], {}), share_prompts=True)
    assert grouped(source, 100) == [([0, 1], 7)]
    batch = source.collate([0, 1], 1)
    assert batch.tokens.tolist() == [[*PROMPT, 1, 3, 2, 4]]
    assert batch.last_index.tolist() == [3, 4, 5, 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 3, 3]]
    assert source.size([0, 1]) == BinSize(7, 16 + 3 * (16 - 9))
    assert (source.num_tokens(), source.repeated_share()) == (10, 0.3)


def test_no_more_keys_are_kept_than_asked_for() -> None:
    rows = [[*PROMPT, i] for i in range(6)]
    source = SampleSource(tokenized(rows, [3] * 6), share_prompts=True, most_keys=2.0)
    # Three rows attend to 12 keys with 6 computed tokens; four would attend to 16 with 7.
    assert grouped(source, 100) == [([0, 1, 2], 6), ([3, 4, 5], 6)]
    batch = source.collate(range(6), 1)
    assert batch.tokens.numel() == source.size(range(6)).tokens == 12
    assert batch.shared_keys is not None
    assert batch.shared_keys.index.numel() == 24


def test_another_prompt_between_two_answers_ends_the_sharing() -> None:
    rows = [[*PROMPT, 1], [5, 5, 5, 1], [*PROMPT, 2]]
    batch = SampleSource(tokenized(rows, [3] * 3), share_prompts=True).collate([0, 1, 2], 1)
    assert batch.shared_keys is None
    assert batch.tokens.numel() == 12


def test_context_parallelism_cuts_bins_of_whole_rows() -> None:
    trainer = ComputeSection()
    assert shares_prompts(trainer, ParallelSection())
    assert not shares_prompts(trainer, ParallelSection(context_parallel_size=2))
    assert not shares_prompts(replace(trainer, share_prompts=False), ParallelSection())
