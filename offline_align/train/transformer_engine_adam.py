"""Transformer Engine's Adam with moments in bf16 and with fp32 weights in its checkpoints.

This module is imported only if Transformer Engine is installed. For each bf16 weight, FusedAdam stores
the 16 bits by which it differs from the fp32 weight (see `remainders`). megatron's checkpoints would
save these bits in place of the weights, and could not be loaded again. This class joins them to fp32
weights for a checkpoint and splits the weights again when it is loaded.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.optimizers import FusedAdam

from offline_align.train.remainders import join, part

_WEIGHT = "master_param"


class TransformerEngineAdam(FusedAdam):  # type: ignore[misc]
    """FusedAdam that returns and accepts its main weights in fp32."""

    _whole = True

    def initialize_state(self, param: Tensor, store_param_remainders: bool | None = None) -> None:
        """Create zero moments and the main weight or its remainder.

        megatron does not pass `store_param_remainders`, so it is decided here.
        """
        super().initialize_state(param, self._has_remainder(param))

    def state_dict(self) -> Any:
        """Return the state as it is stored; megatron requests each main weight separately."""
        self._whole = False
        try:
            return super().state_dict()
        finally:
            self._whole = True

    def get_unscaled_state(self, param: Tensor, state_name: str, skip_unscale: bool = False) -> Tensor:
        """Return a state of `param` in fp32; with `skip_unscale`, moments are in bf16 for the kernel."""
        if state_name == _WEIGHT and self._whole and self._has_remainder(param):
            return join(param, self.state[param][_WEIGHT])
        state: Tensor = super().get_unscaled_state(param, state_name, skip_unscale)
        return state

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Set a state of `param` from fp32. megatron first passes uninitialised ones of the stored dtype."""
        if state_name == _WEIGHT and param.dtype is torch.float32:
            # The kernel updates an fp32 weight in place. A copy would be stale in the next checkpoint.
            self.state[param][_WEIGHT] = param.detach()
        elif state_name == _WEIGHT and self._has_remainder(param) and unscaled_state.dtype is torch.float32:
            rounded, self.state[param][_WEIGHT] = part(unscaled_state.to(param.device))
            with torch.no_grad():
                param.copy_(rounded)
        else:
            super().set_scaled_state(param, state_name, unscaled_state)

    def _has_remainder(self, param: Tensor) -> bool:
        return bool(self.store_param_remainders) and param.dtype is torch.bfloat16
