"""DPO and IPO against their equations in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offline_align.config.sections import PreferenceLoss, PreferenceMethodSection
from offline_align.data.batch import PackedBatch
from offline_align.objectives.preference import preference

COUNTS = [3, 1, 2, 4, 5, 2]
REFERENCE = [-4.0, -2.0, -3.5, -6.0, -9.0, -1.0]
DPO = PreferenceMethodSection()


def batch(counts: list[int], reference: list[float]) -> PackedBatch:
    empty = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=empty[None],
        positions=empty[None],
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        target_index=empty,
        target_ids=empty,
        target_weights=torch.ones(sum(counts)),
        target_counts=torch.tensor(counts, dtype=torch.int64),
        last_index=empty,
        margins=torch.zeros(len(counts) // 2),
        row_ids=(),
        num_padding=0,
        reference=torch.tensor(reference, dtype=torch.float64),
    )


def nll() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(sum(COUNTS)) * 3


def by_hand(values: Tensor, settings: PreferenceMethodSection) -> Tensor:
    """Return the summed loss of the pairs, written out in float64."""
    answers = [-part.sum() for part in torch.split(values, COUNTS)]
    total = torch.zeros((), dtype=torch.float64)
    for p in range(len(COUNTS) // 2):
        w, r = 2 * p, 2 * p + 1
        if settings.loss is PreferenceLoss.ipo:
            h = (answers[w] - REFERENCE[w]) / COUNTS[w] - (answers[r] - REFERENCE[r]) / COUNTS[r]
            loss = (h - 1 / (2 * settings.beta)) ** 2
        else:
            h = settings.beta * ((answers[w] - REFERENCE[w]) - (answers[r] - REFERENCE[r]))
            e = settings.label_smoothing
            loss = (1 - e) * torch.log1p(torch.exp(-h)) + e * torch.log1p(torch.exp(h))
        total = total + loss - settings.sft_coefficient * answers[w] / COUNTS[w]
    return total


@pytest.mark.parametrize(
    "settings",
    [
        DPO,
        replace(DPO, beta=0.7, label_smoothing=0.2),
        replace(DPO, sft_coefficient=0.3),
        replace(DPO, loss=PreferenceLoss.ipo, beta=0.05),
    ],
    ids=["sigmoid", "smoothed", "sft", "ipo"],
)
def test_losses_and_gradients_are_those_of_the_equations(settings: PreferenceMethodSection) -> None:
    ours, theirs = nll().requires_grad_(), nll().double().requires_grad_()
    result = preference(settings)(ours, batch(COUNTS, REFERENCE))
    expected = by_hand(theirs, settings)
    assert result.count == 3
    assert float(result.total) == pytest.approx(float(expected), rel=1e-6)
    (found,) = torch.autograd.grad(result.total, ours)
    (gradient,) = torch.autograd.grad(expected, theirs)
    assert torch.allclose(found.double(), gradient, rtol=1e-6, atol=1e-9)


def test_the_start_of_the_run_has_the_loss_ln_2() -> None:
    values = nll()
    start = [float(-part.double().sum()) for part in torch.split(values, COUNTS)]
    result = preference(DPO)(values, batch(COUNTS, start))
    assert float(result.total) / 3 == pytest.approx(math.log(2), abs=1e-6)
    assert float(result.metrics["reward_gap"]) == pytest.approx(0.0, abs=1e-12)


def test_metrics_are_sums_over_pairs() -> None:
    values = torch.zeros(sum(COUNTS))
    metrics = {n: float(v) for n, v in preference(DPO)(values, batch(COUNTS, REFERENCE)).metrics.items()}
    # All answers have likelihood 1, so the change of each is minus its reference.
    assert metrics["reward_chosen"] == pytest.approx(0.1 * (4.0 + 3.5 + 9.0))
    assert metrics["reward_rejected"] == pytest.approx(0.1 * (2.0 + 6.0 + 1.0))
    assert metrics["reward_gap"] == pytest.approx(0.1 * (2.0 - 2.5 + 8.0))
    assert (metrics["accuracy"], metrics["ties"]) == (2, 0)


def test_an_empty_share_adds_nothing() -> None:
    result = preference(replace(DPO, sft_coefficient=1.0))(torch.zeros(0), batch([], []))
    assert (float(result.total), result.count) == (0.0, 0)
