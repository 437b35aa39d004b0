"""One packed micro-batch, ready for the model.

Shape legend: T tokens of the bin, S segments (rows) in it, N target tokens, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """A bin of whole rows side by side; attention never crosses a segment."""

    tokens: Tensor
    """[1, T] int64."""
    positions: Tensor
    """[1, T] int64, counted from 0 in each segment."""
    cu_seqlens: Tensor
    """[S + 1] int32: where segments begin and end."""
    max_seqlen: int
    """Tokens of the longest segment."""
    target_index: Tensor
    """[N] int64: places in the bin whose next token is a target."""
    target_ids: Tensor
    """[N] int64: those next tokens."""
    target_weights: Tensor
    """[N] fp32: weight of the row that each target belongs to (Eq. 4 and 5; 1 elsewhere)."""
    last_index: Tensor
    """[S] int64: place of the last token of each segment, where a reward is read."""
    margins: Tensor
    """[P] fp32: margin of each pair (segments 2p and 2p + 1 are chosen and rejected); 0 where it has none."""
    row_ids: tuple[str, ...]
    """Ids of the rows (or pairs) in the bin."""
    num_padding: int
    """Tokens of the bin that belong to no row."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        if device.type == "cpu":
            return self
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> "PackedBatch":
        """Return the batch in pinned memory, from where a copy to the GPU does not hold up the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "PackedBatch":
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
