"""The two objectives against the paper's equations in float64."""

import math

import pytest
import torch

from offline_align.data.batch import PackedBatch
from offline_align.objectives.next_token import next_token
from offline_align.objectives.pairwise import pairwise


def batch(weights: list[float], margins: list[float]) -> PackedBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=empty[None],
        positions=empty[None],
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        target_index=empty,
        target_ids=empty,
        target_weights=torch.tensor(weights),
        target_counts=empty,
        last_index=empty,
        margins=torch.tensor(margins),
        row_ids=(),
        num_padding=0,
    )


def test_weighted_next_token_is_equation_5() -> None:
    nll, weights = [0.5, 2.0, 0.25], [2.0, 2.0, 0.5]
    result = next_token(torch.tensor(nll), batch(weights, []))
    assert float(result.total) == pytest.approx(math.fsum(w * x for w, x in zip(weights, nll, strict=True)))
    assert (result.count, float(result.metrics["nll"])) == (3, 2.75)


def test_ranking_loss_is_equation_2() -> None:
    scores = torch.tensor([1.0, 0.25, -2.0, -1.5, 3.0, 3.0])
    result = pairwise()(scores, batch([], [0.0, 0.0, 0.0]))
    expected = -math.fsum(math.log(1 / (1 + math.exp(-gap))) for gap in (0.75, -0.5, 0.0))
    assert float(result.total) == pytest.approx(expected, rel=1e-6)
    assert result.count == 3


def test_accuracy_ties_and_swapped_accuracy_add_up() -> None:
    scores = torch.tensor([1.0, 0.25, -2.0, -1.5, 3.0, 3.0])
    swapped = scores.view(3, 2).flip(1).reshape(-1)
    one, other = (pairwise()(s, batch([], [0.0] * 3)).metrics for s in (scores, swapped))
    assert [float(one[n]) for n in ("accuracy", "swapped_accuracy", "ties")] == [1, 1, 1]
    assert float(one["accuracy"]) == float(other["swapped_accuracy"])
    assert float(one["reward_gap"]) == -float(other["reward_gap"])


def test_margin_asks_for_a_wider_gap() -> None:
    scores, pairs = torch.tensor([1.0, 0.0]), batch([], [2.0])
    with_margin, without = pairwise(use_margin=True)(scores, pairs), pairwise(use_margin=False)(scores, pairs)
    assert float(with_margin.total) == pytest.approx(math.log(1 + math.exp(1.0)), rel=1e-6)
    assert float(without.total) == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-6)


def test_centring_adds_the_squared_sum() -> None:
    scores, pairs = torch.tensor([1.0, 0.5]), batch([], [0.0])
    difference = pairwise(center_rewards_coefficient=0.1)(scores, pairs).total - pairwise()(scores, pairs).total
    assert float(difference) == pytest.approx(0.1 * 1.5**2, rel=1e-5)


def test_a_padding_segment_is_not_scored() -> None:
    result = pairwise()(torch.tensor([1.0, 0.0, 99.0]), batch([], [0.0]))
    assert float(result.metrics["reward_mean"]) == 0.5


def test_an_empty_share_adds_nothing() -> None:
    assert float(next_token(torch.zeros(0), batch([], [])).total) == 0.0
    assert pairwise()(torch.zeros(0), batch([], [])).count == 0
