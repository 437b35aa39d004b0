"""Packing: every row once, no bin over its capacity, little padding, balanced ranks."""

import random

import pytest

from offline_align.data.pack import pack


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_is_in_one_bin(ranks: int) -> None:
    lengths = random.Random(1).choices(range(1, 400), k=97)
    bins = pack(lengths, 512, ranks)
    assert sorted(i for b in bins for i in b) == list(range(97))
    assert all(sum(lengths[i] for i in b) <= 512 for b in bins)
    assert len(bins) % ranks == 0


def test_bins_are_few_and_balanced() -> None:
    lengths = random.Random(2).choices(range(20, 600), k=256)
    bins = pack(lengths, 4096, 4)
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert len(bins) <= -(-sum(lengths) // 4096) + 4
    assert max(loads) - min(loads) <= 0.02 * max(loads)


def test_fewer_rows_than_ranks_leave_empty_bins() -> None:
    assert pack([5], 10, 3) == [[0], [], []]


def test_a_hard_case_takes_more_bins() -> None:
    assert len(pack([6, 6, 6], 10)) == 3


def test_packing_is_deterministic() -> None:
    lengths = random.Random(3).choices(range(1, 50), k=40)
    assert pack(lengths, 64, 2) == pack(list(lengths), 64, 2)


def test_a_row_over_the_capacity_is_an_error() -> None:
    with pytest.raises(ValueError, match="11 tokens does not fit a bin of 10"):
        pack([3, 11], 10)
