"""Honest meters: real tokens, true segment lengths, and the spread of step times beside their middle."""

import resource
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from offline_align.data.loader import StepData
from offline_align.distributed.hardware import peak_flops
from offline_align.distributed.sizes import ModelSizes


@dataclass
class SpeedMeter:
    """Rates of the steps of this process."""

    sizes: ModelSizes
    reaches_vocabulary: bool
    """Whether targets go through the output layer; with a scalar head none do."""
    device: torch.device
    world_size: int
    _seconds: list[float] = field(default_factory=list)
    _tokens: int = 0
    _data_seconds: float = 0.0

    def step(self, data: StepData, targets: int, seconds: float, data_seconds: float) -> dict[str, float]:
        """Count a step of `seconds`, of which `data_seconds` went by waiting for rows; return its rates.

        `tokens_per_second` counts tokens of rows, over all ranks, and no padding. `mfu` is the share of the devices'
        dense bf16 peak with attention counted causally inside each segment; `mfu_full_attention` is the convention of
        Megatron-LM's logs: attention not halved, every token through the output layer.
        """
        self._seconds.append(seconds)
        self._tokens += data.num_tokens
        self._data_seconds += data_seconds
        computed = data.num_tokens + data.num_padding
        values = {
            "tokens_per_second": data.num_tokens / seconds,
            "tokens_per_second_per_rank": data.num_tokens / seconds / self.world_size,
            "padding_fraction": data.num_padding / computed,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "peak_memory_bytes": float(peak_memory_bytes(self.device)),
        }
        return values | self._utilisation(data, targets, seconds)

    def _utilisation(self, data: StepData, targets: int, seconds: float) -> dict[str, float]:
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak is None:
            return {}
        causal = self.sizes.train_flops(data.num_tokens, data.squared_lengths, targets * self.reaches_vocabulary)
        every = data.num_tokens * self.reaches_vocabulary
        full = self.sizes.train_flops(data.num_tokens, 2 * data.squared_lengths, every)
        available = seconds * peak * self.world_size
        return {"mfu": causal / available, "mfu_full_attention": full / available}

    def summary(self) -> dict[str, float]:
        """Return median and 95th percentile of the step times and what they come to; empty before the first step."""
        if not self._seconds:
            return {}
        total = sum(self._seconds)
        median, p95 = np.percentile(self._seconds, [50, 95])
        return {
            "step_seconds_median": float(median),
            "step_seconds_p95": float(p95),
            "tokens_per_second": self._tokens / total,
            "waiting_for_data_fraction": self._data_seconds / total,
            "peak_memory_bytes": float(peak_memory_bytes(self.device)),
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
