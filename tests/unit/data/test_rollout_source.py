"""Answers as rows: their numbers stay with their tokens through packing, steps and context slices."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from offline_align.data.batch import PackedBatch, RolloutTargets
from offline_align.data.context import share_of_context
from offline_align.data.loader import Loader
from offline_align.data.rollout import RolloutColumns, SampledAnswer
from offline_align.data.rollout_source import RolloutSource

NAMES = [f.name for f in fields(RolloutColumns)]


def answer(name: str, context: list[int], response: list[int]) -> SampledAnswer:
    before, ids = np.array(context, dtype=np.int32), np.array(response, dtype=np.int32)
    return SampledAnswer(name, before, ids, np.zeros(len(response), np.float32), False)


def answers(count: int = 9) -> list[SampledAnswer]:
    """Return answers whose ids are all different, so that an id tells where it came from."""
    draw, first, found = np.random.Generator(np.random.PCG64(2)), 1, []
    for k in range(count):
        context, response = draw.integers(1, 6, 2).tolist()
        ids = list(range(first, first + context + response))
        first += context + response
        found.append(answer(f"r{k}", ids[:context], ids[context:]))
    return found


def columns(given: list[SampledAnswer]) -> RolloutColumns:
    """Return numbers that tell the column and the token that they belong to."""
    ids = np.concatenate([a.response for a in given])
    return RolloutColumns(**{name: (ids + 1000 * k).astype(np.float32) for k, name in enumerate(NAMES)})


def assert_belongs(batch: PackedBatch) -> None:
    """Check that every target is the token after its position, and has the numbers of its own token."""
    assert batch.rollout is not None
    tokens = batch.tokens[0]
    assert torch.equal(tokens[batch.target_index] + 1, batch.target_ids)
    for k, name in enumerate(NAMES):
        assert torch.equal(getattr(batch.rollout, name), (batch.target_ids + 1000 * k).float()), name


def test_a_bin_by_hand() -> None:
    given = [answer("a", [10, 11], [12, 2]), answer("b", [20], [21, 22, 2])]
    numbers = RolloutColumns(*(np.arange(5, dtype=np.float32) + 10 * k for k in range(5)))
    batch = RolloutSource(given, numbers).collate([1, 0], pad_to_multiple=8)
    assert batch.tokens.tolist() == [[20, 21, 22, 2, 10, 11, 12, 2]]
    assert batch.target_ids.tolist() == [21, 22, 2, 12, 2]
    assert batch.target_index.tolist() == [0, 1, 2, 5, 6]
    assert batch.last_index.tolist() == [3, 7]
    assert (batch.row_ids, batch.target_counts.tolist()) == (("b", "a"), [3, 2])
    assert batch.rollout is not None
    assert batch.rollout.old_log_probs.tolist() == [2, 3, 4, 0, 1]
    assert batch.rollout.returns.tolist() == [42, 43, 44, 40, 41]
    assert batch.rollout.returns.dtype == torch.float32


def test_every_rank_and_step_has_the_numbers_of_its_own_tokens() -> None:
    given = answers()
    source = RolloutSource(given, columns(given))
    seen = []
    for rank in range(2):
        loader = Loader(source, 4, len(source), 16, seed=1, dp_rank=rank, dp_size=2, pad_to_multiple=4)
        for step in range(loader.total_steps):
            for batch in loader.step(step).micro_batches:
                assert_belongs(batch)
                seen += batch.target_ids.tolist()
    assert sorted(seen) == sorted(int(i) for a in given for i in a.response)


@pytest.mark.parametrize("size", [2, 3])
def test_context_slices_have_the_numbers_of_their_own_tokens(size: int) -> None:
    given = answers()
    whole = RolloutSource(given, columns(given)).collate(range(len(given)), 2 * size)
    shares = [share_of_context(whole, rank, size) for rank in range(size)]
    put_back = torch.zeros_like(whole.target_ids)
    for share in shares:
        assert share.target_is_here is not None
        assert_belongs(share)
        put_back.masked_scatter_(share.target_is_here, share.target_ids)
    assert put_back.tolist() == whole.target_ids.tolist()
    assert sum(share.target_ids.numel() for share in shares) == whole.target_ids.numel()


def test_a_copy_for_a_device_has_the_numbers() -> None:
    given = answers()
    share = share_of_context(RolloutSource(given, columns(given)).collate([0, 1], 4), 0, 2)
    moved = share._each(torch.Tensor.clone)
    assert isinstance(moved.rollout, RolloutTargets)
    assert share.rollout is not None
    assert moved.rollout.returns is not share.rollout.returns
    assert_belongs(moved)


def test_without_columns_answers_can_only_be_scored() -> None:
    given = answers()
    source = RolloutSource(given)
    assert source.collate([2, 0], 1).rollout is None
    assert source.num_read.tolist() == [len(a.response) for a in given]
    assert (len(source), source.num_tokens()) == (9, sum(len(a.context) + len(a.response) for a in given))


def test_an_empty_bin_has_empty_numbers() -> None:
    given = answers()
    batch = RolloutSource(given, columns(given)).collate([], 4)
    assert batch.rollout is not None
    assert (batch.tokens.numel(), batch.rollout.advantages.numel()) == (4, 0)


def test_the_fingerprint_covers_the_numbers() -> None:
    given = answers()
    numbers = columns(given)
    same, other = columns(given), replace(numbers, returns=numbers.returns + 1)
    first = RolloutSource(given, numbers).fingerprint()
    assert first == RolloutSource(given, same).fingerprint()
    assert first != RolloutSource(given, other).fingerprint()
    assert first != RolloutSource(given).fingerprint()
