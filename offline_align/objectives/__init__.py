"""The objectives: next-token prediction, pairwise ranking, preference, and the two losses of PPO.

Each returns sums and a count, never a mean. Only `train/step.py` divides, by the count of the global
batch, so the result does not depend on micro-batches, packing or the number of data parallel ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offline_align.data.batch import PackedBatch


@dataclass(frozen=True)
class LossSum:
    """The contribution of a micro-batch to a step."""

    total: Tensor
    """Sum of the weighted losses, a scalar in fp32. Its gradient is not divided by the global count yet."""
    count: int
    """Number of targets or pairs. The loss is divided by its sum over the global batch."""
    metrics: dict[str, Tensor]
    """Further scalar sums, detached. They are divided by the global count for the report."""


Objective = Callable[[Tensor, PackedBatch], LossSum]
