"""Record the updates of a training run, and compute the expected parameters with AdamW in float64."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_align.config.sections import OptimSection

Weights = dict[str, Tensor]
# With so large an epsilon, gradients change nothing, and only the weight decay remains: 0.001 per step.
DECAY_ALONE = ["optim.lr=1e-2", "optim.lr_decay_style=constant", "optim.adam_eps=1e3"]


def recording(update: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """Return `TrainStep._update`, wrapped to write this rank's weights and gradients to `path` in float64."""
    done: list[dict[str, Any]] = []

    @functools.wraps(update)
    def recorded(self: Any, count: int, loss_is_finite: bool) -> Any:
        parameters = dict(self.model.module.named_parameters())
        rate = self.optimizer.param_groups[0]["lr"]
        gradients = {name: parameter.main_grad.double() / count for name, parameter in parameters.items()}
        before = _weights(parameters)
        result = update(self, count, loss_is_finite)
        done.append({"rate": rate, "gradients": gradients, "before": before, "after": _weights(parameters)})
        torch.save(done, path)
        return result

    return recorded


def _weights(parameters: dict[str, Any]) -> Weights:
    # `copy=True`, since tensors that are float64 already would not be copied otherwise.
    return {name: parameter.detach().to(torch.float64, copy=True) for name, parameter in parameters.items()}


def record(folder: str) -> None:
    """Make each rank started by this process write its updates to `folder`."""
    from offline_align.train.step import TrainStep

    path = Path(folder) / f"updates_{os.environ.get('RANK', '0')}"
    TrainStep._update = recording(TrainStep._update, path)  # type: ignore[method-assign]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records written by `recording`, one per update."""
    found: list[dict[str, Any]] = torch.load(path, weights_only=True)
    return found


def expected(done: list[dict[str, Any]], optim: OptimSection) -> Weights:
    """Return the weights after all updates, with decoupled weight decay on matrices only."""
    weights: Weights = dict(done[0]["before"])
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step, update in enumerate(done, start=1):
        norm = torch.stack([gradient.norm() for gradient in update["gradients"].values()]).norm()
        scale = (optim.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        for name, weight in weights.items():
            gradient = update["gradients"][name] * scale
            first[name] = optim.adam_beta1 * first[name] + (1 - optim.adam_beta1) * gradient
            second[name] = optim.adam_beta2 * second[name] + (1 - optim.adam_beta2) * gradient**2
            mean = first[name] / (1 - optim.adam_beta1**step)
            root = (second[name] / (1 - optim.adam_beta2**step)).sqrt()
            decay = optim.weight_decay if weight.dim() > 1 else 0.0
            weights[name] = weight - update["rate"] * (mean / (root + optim.adam_eps) + decay * weight)
    return weights


def largest_error(found: Weights, wanted: Weights) -> float:
    """Return the largest absolute difference over all parameters."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def decayed_weights(done: list[dict[str, Any]], decay: float = 0.1) -> Weights:
    """Return the weights after all updates if gradients change nothing (`DECAY_ALONE`)."""
    return {
        name: weight * (1 - done[0]["rate"] * decay) ** len(done) if weight.dim() > 1 else weight
        for name, weight in done[0]["before"].items()
    }
