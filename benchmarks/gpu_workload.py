"""The workload of the GPU benchmark: the 8 B shape, rows of random tokens in realistic lengths, and timing.

With SMOKE=1 everything is tiny and runs on the CPU. The same code runs, but the numbers mean nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

SMOKE = os.environ.get("SMOKE") == "1"
DEVICE = torch.device("cpu" if SMOKE else "cuda")
DTYPE = torch.float32 if SMOKE else torch.bfloat16
MAX_LENGTH = 64 if SMOKE else 4096
BINS_PER_STEP = 2 if SMOKE else 8
WARM_UP_STEPS, TIMED_STEPS = (1, 2) if SMOKE else (4, 16)
FULL_LAYERS, TRAINED_LAYERS = (2, 1) if SMOKE else (32, 8)
# Llama 3 8B, with the names of transformers.
WIDTHS = {
    "hidden_size": 32 if SMOKE else 4096,
    "intermediate_size": 96 if SMOKE else 14336,
    "num_attention_heads": 4 if SMOKE else 32,
    "num_key_value_heads": 2 if SMOKE else 8,
    "vocab_size": 256 if SMOKE else 128256,
}


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed step."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Return the seconds of the median step."""
        return float(np.median(self.seconds))

    @property
    def p95_over_median(self) -> float:
        """Return the ratio of the 95th percentile to the median."""
        return float(np.percentile(self.seconds, 95)) / self.median


def row_lengths(full: bool, tokens: int, seed: int = 0) -> list[int]:
    """Return row lengths with a sum of about `tokens`.

    Rows are full, or a mixture whose mean length is an eighth of a full row.
    """
    if full:
        return [MAX_LENGTH] * (tokens // MAX_LENGTH)
    generator = np.random.Generator(np.random.PCG64(seed))
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = generator.lognormal(np.log(MAX_LENGTH / 8) - 0.32, 0.8)
        lengths.append(int(np.clip(drawn, 8, MAX_LENGTH)))
    return lengths


def timed(step: Callable[[], Any]) -> Timing:
    """Return the device times of a step after a warm-up, and the peak memory of the timed steps.

    The host may run ahead of the device, as in training. A step that must wait for its result does so
    itself.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    if DEVICE.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(TIMED_STEPS):
            step()
            marks.append(time.perf_counter())
        return Timing([end - start for start, end in pairwise(marks)])
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return Timing([start.elapsed_time(end) / 1000 for start, end in pairwise(events)])


def memory_bytes() -> float:
    """Return the peak of allocated GPU memory since its last reset, or 0 on the CPU."""
    return float(torch.cuda.max_memory_allocated()) if DEVICE.type == "cuda" else 0.0


def cost(lengths: list[int]) -> tuple[int, int]:
    """Return the number of tokens and the sum of squared lengths, for rows without shared prompts."""
    return sum(lengths), sum(n * n for n in lengths)


def result(
    timing: Timing, tokens: int, computed: tuple[int, int], targets: int, layers: int, training: bool
) -> dict[str, float]:
    """Return the rates of a run: `tokens` per second, and MFU with respect to the bf16 peak.

    `computed` holds the number of tokens that the model processed and the sum of the squared lengths of
    their rows. The count assumes causal attention, and the last layer's MLP on targets only.
    """
    from offline_align.estimate.hardware import peak_flops
    from offline_align.estimate.sizes import ModelSizes

    heads, hidden = WIDTHS["num_attention_heads"], WIDTHS["hidden_size"]
    width = hidden // heads
    kv = width * WIDTHS["num_key_value_heads"]
    sizes = ModelSizes(hidden, width, hidden, kv, WIDTHS["intermediate_size"], layers, WIDTHS["vocab_size"], tied=False)
    flops = sizes.train_flops(*computed, targets, targets) / (1 if training else 3)
    found = {
        "tokens_per_second": tokens / timing.median,
        "p95_over_median": timing.p95_over_median,
        "gpu_memory_bytes": memory_bytes(),
    }
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return found | ({"mfu": flops / timing.median / peak} if peak else {})
