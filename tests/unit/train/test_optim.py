"""Learning rates, AdamW and the gradient norm."""

import pytest
import torch

from offline_align.config.sections import DecayStyle, OptimSection
from offline_align.train.adam import Adam
from offline_align.train.optim import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    return [learning_rate(s, OptimSection(lr=1.0, **settings), steps) for s in range(steps)]  # type: ignore[arg-type]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    found = rates(10, lr_warmup_steps=4, lr_decay_style=DecayStyle.constant)
    assert found == [0.25, 0.5, 0.75, *[1.0] * 7]


def test_cosine_falls_from_the_peak_and_never_to_zero_within_the_run() -> None:
    found = rates(10, lr_decay_style=DecayStyle.cosine)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[5] == pytest.approx(0.5)
    assert found[-1] > 0


def test_linear_ends_at_the_minimum_after_decay_steps() -> None:
    found = rates(10, lr_decay_style=DecayStyle.linear, lr_decay_steps=5, min_lr=0.1)
    assert found[:6] == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28, 0.1])
    assert found[9] == pytest.approx(0.1)


def test_adam_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = (Adam(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings))  # type: ignore[arg-type]
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.randn_like(mine)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizers[0].param_groups[0]["step"] == 5


def test_adam_counts_steps_of_groups_without_gradients() -> None:
    optimizer = Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert not optimizer.state


def test_the_norm_of_many_gradients_is_that_of_all_numbers() -> None:
    from offline_align.train.optim import _l2_norm

    torch.manual_seed(0)
    tensors = [torch.randn(4, 3), torch.randn(5), torch.randn(2, 2).to(torch.bfloat16)]
    norm, _ = _l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.dtype is torch.float32
    assert float(norm) == pytest.approx(float(torch.cat([t.float().flatten() for t in tensors]).norm()))
