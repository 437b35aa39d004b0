"""Cutting ranges of elements into boxes."""

import itertools
import math

import pytest
import torch

from offline_align.train.optimizer_state import cut


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4, 3), (2, 3, 4), (4, 1), (1, 1, 6)])
def test_boxes_hold_the_elements_in_their_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    whole = torch.arange(size).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        boxes = cut(start, stop, shape)
        found = []
        for offsets, sizes in boxes:
            assert all(sizes)
            box = whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
            assert box.shape == sizes
            found += box.flatten().tolist()
        assert found == list(range(start, stop))
        # The fewest possible: two for each axis except the last, and one of whole rows.
        assert len(boxes) <= 2 * len(shape) - 1


def test_a_range_that_ends_before_it_begins_has_none() -> None:
    assert cut(4, 2, (2, 3)) == cut(4, 2, (6,)) == []


def test_whole_rows_are_one_box() -> None:
    assert cut(5, 15, (4, 5)) == [((1, 0), (2, 5))]
    assert cut(3, 17, (4, 5)) == [((0, 3), (1, 2)), ((1, 0), (2, 5)), ((3, 0), (1, 2))]
