"""Weighted next-token prediction: the loss of SFT, FA, RWR and CA (Eq. 1, 4, 5 and 6)."""

from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.objectives import LossSum


def next_token(nll: Tensor, batch: PackedBatch) -> LossSum:
    """Return `sum_i w * (-log p(x_i | p, x_<i))` over the targets of `batch`; `nll` is [N] in fp32.

    The count is the number of target tokens. Weights have mean 1 over the data set, so they do not change
    the scale of the gradient. The metric `nll` is the unweighted sum.
    """
    return LossSum(
        total=(nll * batch.target_weights).sum(),
        count=nll.numel(),
        metrics={"nll": nll.detach().sum()},
    )
