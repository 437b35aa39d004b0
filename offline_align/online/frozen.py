"""Weights that stay as they were, kept on the host and put into a live model for forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FrozenWeights:
    """A copy of the weights of a module at one moment, in host memory."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = _copied(module)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Give `module` these weights inside the context, and its own again afterwards, bit for bit."""
        own = _copied(module)
        _write(self._weights, module)
        try:
            yield
        finally:
            _write(own, module)


def _copied(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in module.parameters()]


@torch.no_grad()
def _write(weights: list[Tensor], module: nn.Module) -> None:
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.copy_(weight)
