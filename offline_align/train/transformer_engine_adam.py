"""Transformer Engine's Adam with moments in bf16, whose checkpoints hold whole weights.

Imported only where Transformer Engine is installed. For weights in bf16 it keeps what they lack of fp32, 16 bits each.
megatron's checkpoints would hold those bits in the place of the weights, and could not be read back: here they are
joined to whole weights for a checkpoint and parted after it.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam

from offline_align.train.remainders import join, part

_WEIGHT = "master_param"


class TransformerEngineAdam(FusedAdam):  # type: ignore[misc]
    """FusedAdam that gives and takes its main weights in fp32."""

    _whole = True

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """Make moments of zero, and what the weight lacks; megatron does not say whether that is a remainder."""
        super().initialize_state(param, self._has_remainder(param))

    def state_dict(self) -> Any:
        """Return the states as they are kept; megatron asks for each weight by itself."""
        self._whole = False
        try:
            return super().state_dict()
        finally:
            self._whole = True

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        """Return a state of `param` in fp32 (in bf16 with `skip_unscale`, as its kernel takes moments)."""
        if state_name == _WEIGHT and self._whole and self._has_remainder(param):
            return join(param, self.state[param][_WEIGHT])
        state: Tensor = super().get_unscaled_state(param, state_name, skip_unscale)
        return state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set a state of `param` from fp32; megatron also gives it empty ones of the final type first."""
        if state_name == _WEIGHT and param.dtype is torch.float32:
            # The kernel updates such a weight in its place: any other would be stale in the next checkpoint.
            self.state[param][_WEIGHT] = param.detach()
        elif state_name == _WEIGHT and self._has_remainder(param) and unscaled_state.dtype is torch.float32:
            rounded, self.state[param][_WEIGHT] = part(unscaled_state.to(param.device))
            with torch.no_grad():
                param.copy_(rounded)
        else:
            super().set_scaled_state(param, state_name, unscaled_state)

    def _has_remainder(self, param: Tensor) -> bool:
        return bool(self.store_param_remainders) and param.dtype is torch.bfloat16
