"""Transformer Engine's Adam with moments in bf16, whose checkpoints hold whole weights.

Imported only where Transformer Engine is installed. For weights in bf16 it keeps what they lack of fp32, 16 bits each.
megatron's checkpoints would hold those bits in the place of the weights, and could not be read back: here they are
joined to whole weights for a checkpoint and parted after it, so that any optimizer can go on from it.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam

from offline_align.train.remainders import join, part

_WEIGHT = "master_param"


class EngineAdam(FusedAdam):  # type: ignore[misc]
    """FusedAdam that gives and takes its main weights in fp32."""

    _whole = True

    def state_dict(self) -> Any:
        """Return the states as they are kept; megatron asks for each weight by itself."""
        self._whole = False
        try:
            return super().state_dict()
        finally:
            self._whole = True

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        """Return a state of `param` in fp32 (in bf16 with `skip_unscale`, as its kernel takes moments)."""
        if state_name == _WEIGHT and self._whole:
            return join(param, self.state[param][_WEIGHT]) if self._has_remainder(param) else param.detach()
        state: Tensor = super().get_unscaled_state(param, state_name, skip_unscale)
        return state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set a state of `param` from fp32; megatron also gives it empty ones of the final type first."""
        if state_name != _WEIGHT or unscaled_state.dtype is torch.int16:
            super().set_scaled_state(param, state_name, unscaled_state)
        elif self._has_remainder(param):
            rounded, self.state[param][_WEIGHT] = part(unscaled_state.to(param.device))
            with torch.no_grad():
                param.copy_(rounded)
        else:
            # The kernel updates a weight in fp32 in its place, and reads nothing here.
            self.state[param][_WEIGHT] = param.detach()

    def _has_remainder(self, param: Tensor) -> Any:
        return self.store_param_remainders and param.dtype is torch.bfloat16
