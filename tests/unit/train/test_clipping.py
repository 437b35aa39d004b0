"""Gradients are divided by the count and clipped, in either attribute in which megatron stores them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offline_align.distributed.cpu import enable


@pytest.mark.parametrize("name", ["grad", "decoupled_grad"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("clip_grad", "scale"), [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_are_divided_and_clipped(name: str, count: int, clip_grad: float, scale: float) -> None:
    enable()
    from offline_align.train.step import TrainStep

    weight: Any = torch.nn.Parameter(torch.zeros(4))
    setattr(weight, name, torch.full((4,), 5.0 * count))
    step: Any = object.__new__(TrainStep)
    step.clip_grad = clip_grad
    applied: list[bool] = []
    step.optimizer = SimpleNamespace(
        prepare_grads=lambda: None,
        get_grad_norm=lambda: 10.0 * count,
        get_parameters=lambda: [weight],
        step_with_ready_grads=lambda: applied.append(True),
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=name == "decoupled_grad"),
    )
    assert step._update(count, loss_is_finite=True) == (10.0, True)
    assert applied == [True]
    assert torch.allclose(getattr(weight, name), torch.full((4,), 5.0 * scale), rtol=1e-6)
