import numpy as np
import pytest
import torch

from offline_align.generate.requests import Request
from offline_align.generate.sampling import choose, draw, uniforms


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0]).expand(4000, -1)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(choose(logits, uniform, temperature=0.7, top_p=1.0), minlength=4) / 4000
    expected = torch.softmax(logits[0] / 0.7, dim=0)
    assert (counts - expected).abs().max() < 1e-3


def test_top_p_keeps_the_smallest_set_with_that_probability() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05, in another order.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(1000, -1)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        ids = choose(logits, uniform, temperature=1.0, top_p=top_p)
        assert set(ids.tolist()) == kept
    share = (choose(logits, uniform, 1.0, 0.6) == 1).double().mean().item()
    assert share == pytest.approx(0.5 / 0.8, abs=2e-3)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_are_in_range(number: float) -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    ids = choose(logits, torch.full((3,), number, dtype=torch.float64), 0.5, 0.8)
    assert ((ids >= 0) & (ids < 11)).all()
    if number == 0.0:
        assert torch.equal(ids, logits.argmax(-1))


def test_very_low_temperature_is_greedy() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    ids = choose(logits, torch.rand(5, dtype=torch.float64), 1e-4, 1.0)
    assert torch.equal(ids, logits.argmax(-1))


def test_numbers_belong_to_seed_row_and_sample_alone() -> None:
    cpu = torch.device("cpu")
    requests = [Request(row, sample, [1], 8) for row in range(3) for sample in range(2)]
    together = uniforms(requests, 5, cpu)
    assert torch.equal(uniforms([requests[4]], 5, cpu)[0], together[4])
    assert torch.equal(uniforms([Request(2, 0, [1], 3)], 5, cpu)[0], together[4, :3])
    assert len({tuple(row) for row in together.tolist()}) == 6
    assert not torch.equal(uniforms(requests, 6, cpu), together)
    assert 0.0 <= together.min() < together.max() < 1.0
    assert together.dtype == torch.float64
    assert np.isclose(uniforms([Request(0, 0, [1], 20000)], 5, cpu).mean().item(), 0.5, atol=0.01)


def test_ids_of_a_rollout_have_the_frequencies_that_their_log_probabilities_say() -> None:
    logits = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -1.0]).expand(4000, -1)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    ids, log_probs = draw(logits, uniform, temperature=0.7)
    expected = torch.log_softmax(logits[0] / 0.7, dim=0)
    assert (torch.bincount(ids, minlength=5) / 4000 - expected.exp()).abs().max() < 1e-3
    assert torch.equal(log_probs, expected[ids])


def test_a_rollout_never_draws_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf, -torch.inf]])
    first, last = (torch.full((1,), number, dtype=torch.float64) for number in (0.0, 1 - 2**-53))
    assert draw(logits, first, 1.0)[0].item() == 1
    assert draw(logits, last, 1.0)[0].item() == 2
    # A total below 1 by rounding must not leave room behind the last token.
    many = torch.randn(64, 4001, generator=torch.Generator().manual_seed(0))
    many[:, 3000:] = -torch.inf
    ids, log_probs = draw(many, last.expand(64), 1.0)
    assert (ids == 2999).all()
    assert log_probs.isfinite().all()
