"""AdamW with the interface of the fused optimizers that megatron-core expects."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """AdamW on torch's fused kernels, with one step counter per parameter group.

    megatron's distributed checkpoints store moments as tensors that are sharded by the layout, and
    the step with its parameter group. torch's own AdamW has a step tensor per parameter, which cannot
    be sharded. Transformer Engine and apex keep the step in the group, as this class does, so one
    checkpoint fits all three.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, "only decoupled weight decay outside CUDA graphs is offered"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient (decoupled weight decay, bias correction)."""
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
            self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        # torch's kernel wants a step tensor per parameter and increments it. These tensors are only
        # used in this call; `torch.full` fills them on the device without a synchronisation.
        counters = torch.full((len(params),), group["step"] - 1.0, dtype=torch.float32, device=params[0].device)
        steps = list(counters.unbind())
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
