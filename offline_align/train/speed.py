"""Throughput, utilisation and step times.

Only real tokens count, attention costs follow the true segment lengths, and step times are reported
with their spread.
"""

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offline_align.data.loader import StepData
from offline_align.estimate.hardware import peak_flops
from offline_align.estimate.sizes import ModelSizes


class OwnTime:
    """Measures this rank's own part of a step: waiting for its rows and computing its gradients.

    The measurement ends when the rank begins to reduce gradients with the others. Tensor parallel ranks
    wait for each other in every layer, so they show equal times; only their groups can differ.
    """

    def __init__(self, device: torch.device) -> None:
        event: Any = torch.cuda.Event
        self._events = [event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [0.0, 0.0]
        self._waited = 0.0

    def start(self, waited: float) -> None:
        """Mark the start of a step. `waited` is the time in seconds that this rank waited for its rows."""
        self._waited = waited
        self._mark(0)

    def stop(self) -> None:
        """Mark the end of this rank's own work."""
        self._mark(1)

    def seconds(self) -> float:
        """Return the seconds of the last step, or 0 before the first one.

        The results of that step must have been read, so that its CUDA events are complete.
        """
        if not self._times[1]:
            return 0.0
        if self._events:
            return self._waited + float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._waited + self._times[1] - self._times[0]

    def _mark(self, which: int) -> None:
        self._times[which] = time.monotonic()
        if self._events:
            self._events[which].record()


def stragglers(seconds: list[float], hosts: list[str]) -> dict[str, float | str]:
    """Return median and maximum of the ranks' seconds, and the slowest rank with its host.

    Returns an empty dict for a single rank, and if a rank has not measured a step yet.
    """
    if len(seconds) < 2 or min(seconds) <= 0:
        return {}
    median, slowest = float(np.median(seconds)), int(np.argmax(seconds))
    return {
        "rank_seconds_median": median,
        "rank_seconds_max": seconds[slowest],
        "slowest_rank": slowest,
        "slowest_host": hosts[slowest],
    }


@dataclass
class SpeedMeter:
    """Computes rates of single steps and of all steps of this process."""

    sizes: ModelSizes
    reads_everywhere: bool
    """Whether the last layer computes all tokens, as under sequence parallelism, or only those the head reads."""
    device: torch.device
    world_size: int
    _seconds: list[float] = field(default_factory=list)
    _tokens: int = 0
    _data_seconds: float = 0.0

    def step(self, data: StepData, seconds: float, data_seconds: float) -> dict[str, float]:
        """Record a step of `seconds`, of which `data_seconds` were spent waiting for rows; return its rates.

        - `tokens_per_second`: tokens of rows over all ranks. A shared prompt counts once, padding never.
        - `mfu`: share of the devices' dense bf16 peak, counting what is computed; attention is causal
          inside each segment.
        - `mfu_full_attention`: the convention of Megatron-LM's logs. Attention is not halved, and every
          token passes through all layers and the output layer.
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
        return values | self._utilisation(data, seconds)

    def _utilisation(self, data: StepData, seconds: float) -> dict[str, float]:
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if peak is None:
            return {}
        tokens = data.num_tokens
        read = tokens if self.reads_everywhere else data.num_read
        causal = self.sizes.train_flops(tokens, data.squared_lengths, data.num_read, read)
        full = self.sizes.train_flops(tokens, 2 * data.squared_lengths, tokens, tokens)
        available = seconds * peak * self.world_size
        return {"mfu": causal / available, "mfu_full_attention": full / available}

    def summary(self) -> dict[str, float]:
        """Return median and 95th percentile of step times, and rates over all steps; {} before the first step."""
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
    """Return the peak memory of this process in bytes: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
