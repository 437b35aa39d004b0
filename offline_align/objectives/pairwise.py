"""Pairwise ranking: the loss of the reward model (Eq. 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.objectives import LossSum, Objective


def pairwise(use_margin: bool = True, center_rewards_coefficient: float = 0.0) -> Objective:
    """Return the objective `-log sigmoid(r(x, y_w) - r(x, y_l) - margin)`, summed over pairs.

    A positive `center_rewards_coefficient` adds `(r_w + r_l)^2` times the coefficient, which keeps the
    mean of the rewards near zero.

    Metrics: `accuracy` (chosen above rejected), `ties` (equal scores) and `swapped_accuracy` (rejected
    above chosen), which add up to 1; `reward_gap` and `reward_mean`.
    """

    def objective(scores: Tensor, batch: PackedBatch) -> LossSum:
        pairs = batch.margins.numel()
        # Segments 2p and 2p + 1 are the chosen and the rejected answer of pair p. A padding segment may
        # follow the last pair.
        chosen, rejected = scores[: 2 * pairs].view(pairs, 2).unbind(1)
        gap = chosen - rejected
        loss = -F.logsigmoid(gap - batch.margins if use_margin else gap)
        if center_rewards_coefficient:
            loss = loss + center_rewards_coefficient * (chosen + rejected) ** 2
        return LossSum(loss.sum(), pairs, _metrics(chosen.detach(), rejected.detach()))

    return objective


def _metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    gap = chosen - rejected
    return {
        "accuracy": (gap > 0).sum().to(torch.float32),
        "ties": (gap == 0).sum().to(torch.float32),
        "swapped_accuracy": (gap < 0).sum().to(torch.float32),
        "reward_gap": gap.sum(),
        "reward_mean": (chosen + rejected).sum() / 2,
    }
