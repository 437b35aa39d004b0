"""The two objectives: weighted next-token prediction and pairwise ranking.

Each returns sums and a count, never a mean: `train/step.py` alone divides, by the count of the global batch, so the
result does not depend on micro-batches, packing or the number of data parallel ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from offline_align.data.batch import PackedBatch


@dataclass(frozen=True)
class LossSum:
    """What a micro-batch adds to a step."""

    total: Tensor
    """Scalar fp32: sum of the weighted losses; its gradient is that of the step times `count` of the global batch."""
    count: int
    """What the sum is divided by, added up over the global batch: targets or pairs."""
    metrics: dict[str, Tensor]
    """Further scalar sums, detached; reported divided by the global count."""


Objective = Callable[[Tensor, PackedBatch], LossSum]
