"""The losses of PPO and their gradients, by hand and against their equations in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offline_align.config.sections import PolicyOptimizationMethodSection
from offline_align.data.batch import PackedBatch, RolloutTargets
from offline_align.data.loader import StepData
from offline_align.data.mixed_steps import with_texts
from offline_align.objectives.ppo import actor, critic
from tests.unit.objectives.test_objectives import batch

SETTINGS = PolicyOptimizationMethodSection()
TOKENS = 500


def bin_of(**columns: Tensor) -> PackedBatch:
    (count,) = {len(column) for column in columns.values()}
    ones = {"importance": torch.ones(count)}
    names = ("old_log_probs", "advantages", "importance", "old_values", "returns")
    every = {name: columns.get(name, ones.get(name, torch.zeros(count))) for name in names}
    return replace(batch([1.0] * count, []), rollout=RolloutTargets(**every))


def drawn() -> tuple[Tensor, PackedBatch]:
    """Return the output of a model and a bin, with values on both sides of every bound."""
    torch.manual_seed(0)
    output, old = -torch.rand(TOKENS) * 3, -torch.rand(TOKENS) * 3
    known = bin_of(
        old_log_probs=output + 0.3 * torch.randn(TOKENS),
        advantages=torch.randn(TOKENS),
        importance=torch.rand(TOKENS) * 2,
        old_values=old,
        returns=old + torch.randn(TOKENS),
    )
    return output, known


def compare(found: Tensor, expected: Tensor, ours: Tensor, theirs: Tensor) -> None:
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    (gradient,), (exact,) = torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs)
    assert torch.allclose(gradient.double(), exact, rtol=1e-4, atol=1e-6)
    assert float(exact.abs().sum()) > 1


def test_the_loss_of_the_policy_is_its_equation() -> None:
    log_probs, known = drawn()
    data = known.rollout
    assert data is not None
    ours, theirs = (-log_probs).requires_grad_(), (-log_probs).double().requires_grad_()
    result = actor(SETTINGS)(ours, known)
    expected = torch.zeros((), dtype=torch.float64)
    cut = 0
    for t in range(TOKENS):
        ratio = torch.exp(-theirs[t]) / math.exp(float(data.old_log_probs[t]))
        advantage = float(data.advantages[t])
        bound = 1.2 if advantage > 0 else 0.8
        beyond = float(ratio) > bound if advantage > 0 else float(ratio) < bound
        cut += beyond
        expected = expected - float(data.importance[t]) * (bound * advantage if beyond else ratio * advantage)
    compare(result.total, expected, ours, theirs)
    assert result.count == TOKENS
    assert float(result.metrics["clip_fraction"]) == cut > 50


def test_the_loss_of_the_critic_is_its_equation() -> None:
    values, known = drawn()
    data = known.rollout
    assert data is not None
    ours, theirs = values.requires_grad_(), values.detach().double().requires_grad_()
    result = critic(SETTINGS)(ours, known)
    expected, cut = torch.zeros((), dtype=torch.float64), 0
    for t in range(TOKENS):
        old, target = float(data.old_values[t]), float(data.returns[t])
        free = (theirs[t] - target) ** 2
        near = (min(max(float(theirs[t]), old - 0.2), old + 0.2) - target) ** 2
        beyond = abs(float(theirs[t]) - old) > 0.2
        # Inside the interval both are the same, with the gradient of the free one.
        cut += beyond and near > float(free)
        expected = expected + (near if beyond and near > float(free) else free) / 2
    compare(result.total, expected, ours, theirs)
    assert result.count == TOKENS
    assert float(result.metrics["clip_fraction"]) == cut > 50
    assert float(result.metrics["unclipped_loss"]) == pytest.approx(
        float((values.detach().double() - data.returns).square().sum() / 2), rel=1e-6
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # beyond the bound in the good direction: nothing more to earn
        (0.5, 2.0, -1.0, -1.0),  # the policy has moved away from a good token: it is pulled back
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_prob = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    known = bin_of(old_log_probs=torch.tensor([-1.0]), advantages=torch.tensor([advantage]))
    result = actor(SETTINGS)(-log_prob, known)
    (gradient,) = torch.autograd.grad(result.total, log_prob)
    assert float(result.total) == pytest.approx(loss, rel=1e-6)
    assert float(gradient) == pytest.approx(slope, rel=1e-6)
    assert float(result.metrics["clip_fraction"]) == (slope == 0)


@pytest.mark.parametrize(
    ("value", "returned", "loss", "slope"),
    [
        (0.1, 1.0, 0.405, -0.9),  # within the interval around the old value 0
        (0.5, 1.0, 0.32, 0.0),  # counts as 0.2
        (-0.5, 1.0, 1.125, -1.5),  # moved away from the return: the larger error counts
        (0.5, 0.0, 0.125, 0.5),
    ],
)
def test_value_clipping_by_hand(value: float, returned: float, loss: float, slope: float) -> None:
    values = torch.tensor([value], requires_grad=True)
    result = critic(SETTINGS)(values, bin_of(returns=torch.tensor([returned])))
    (gradient,) = torch.autograd.grad(result.total, values)
    assert float(result.total) == pytest.approx(loss, rel=1e-6)
    assert float(gradient) == pytest.approx(slope, rel=1e-6)


def test_the_first_mini_batch_is_the_policy_gradient() -> None:
    """While the policy is the one that answered, ratios are 1 and the gradient is -w A for each token."""
    log_probs, known = drawn()
    data = known.rollout
    assert data is not None
    same = replace(known, rollout=replace(data, old_log_probs=log_probs))
    nll = (-log_probs).requires_grad_()
    result = actor(SETTINGS)(nll, same)
    (gradient,) = torch.autograd.grad(result.total, nll)
    assert torch.allclose(gradient, data.importance * data.advantages)
    assert float(result.metrics["ratio"]) / TOKENS == pytest.approx(1.0, abs=1e-6)
    assert (float(result.metrics["clip_fraction"]), float(result.metrics["approximate_kl"])) == (0.0, 0.0)


def test_advantages_of_zero_teach_nothing() -> None:
    log_probs, known = drawn()
    data = known.rollout
    assert data is not None
    nll = (-log_probs).requires_grad_()
    result = actor(SETTINGS)(nll, replace(known, rollout=replace(data, advantages=torch.zeros(TOKENS))))
    (gradient,) = torch.autograd.grad(result.total, nll)
    assert float(result.total) == 0
    assert not gradient.any()


def test_small_changes_have_an_exact_divergence() -> None:
    """In fp32, `ratio - 1 - log ratio` of a change of 1e-3 would lose most of its digits."""
    change = torch.tensor([1e-3, -2e-3])
    result = actor(SETTINGS)(-change, bin_of(old_log_probs=torch.zeros(2)))
    expected = sum(math.expm1(float(c)) - float(c) for c in change)
    assert float(result.metrics["approximate_kl"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_far_off_leaves_the_step_finite(advantage: float) -> None:
    log_prob = torch.tensor([-0.5], requires_grad=True)
    known = bin_of(old_log_probs=torch.tensor([-200.0]), advantages=torch.tensor([advantage]))
    result = actor(SETTINGS)(-log_prob, known)
    (gradient,) = torch.autograd.grad(result.total, log_prob)
    assert bool(torch.isfinite(result.total)) and bool(torch.isfinite(gradient).all())


def test_an_empty_share_adds_nothing() -> None:
    for objective in (actor(SETTINGS), critic(SETTINGS)):
        result = objective(torch.zeros(0), bin_of(old_log_probs=torch.zeros(0)))
        assert (float(result.total), result.count) == (0.0, 0)
        assert all(float(value) == 0 for value in result.metrics.values())


def test_texts_add_their_mean_loss_times_the_coefficient() -> None:
    """A step of answers and texts has the loss of Eq. 3: each term is a mean over its own targets."""
    log_probs, known = drawn()
    text_nll = torch.rand(40) * 5
    texts = batch([1.0] * 40, [])
    step = with_texts(step_data([known], TOKENS), step_data([texts], 40))
    settings = replace(SETTINGS, ptx_coefficient=0.3)
    sums = [actor(settings)(nll, b) for nll, b in zip((-log_probs, text_nll), step.micro_batches, strict=True)]
    assert sum(s.count for s in sums) == TOKENS
    alone = actor(SETTINGS)(-log_probs, known)
    expected = float(alone.total) / TOKENS + 0.3 * float(text_nll.double().mean())
    assert float(sum(s.total for s in sums)) / TOKENS == pytest.approx(expected, rel=1e-5)
    assert sums[0].metrics.keys() == sums[1].metrics.keys() == alone.metrics.keys() | {"ptx_loss"}
    means = {name: float(sum(s.metrics[name] for s in sums)) / TOKENS for name in sums[0].metrics}
    assert means["ptx_loss"] == pytest.approx(float(text_nll.mean()), rel=1e-5)
    assert means["ratio"] == pytest.approx(float(alone.metrics["ratio"]) / TOKENS, rel=1e-6)


def test_a_step_with_texts_counts_both() -> None:
    _, known = drawn()
    texts = step_data([batch([1.0] * 40, [])] * 2, 80)
    step = with_texts(step_data([known], TOKENS), texts)
    assert (len(step.micro_batches), step.num_rows, step.num_read, step.num_tokens) == (3, 1, TOKENS + 80, 4)
    assert step.micro_batches[1].target_weights.tolist() == [TOKENS / 80] * 40
    assert texts.micro_batches[0].target_weights.tolist() == [1.0] * 40
    # A rank may have no text in a step.
    assert len(with_texts(step_data([known], TOKENS), step_data([batch([], [])], 0)).micro_batches) == 2


def step_data(micro_batches: list[PackedBatch], num_read: int) -> StepData:
    return StepData(micro_batches, 1, 2, 0, 3, num_read)
