"""This machine as a device of a plan: its first GPU, or its CPU cores, memory and speed."""

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from offline_align.estimate.hardware import NODES, Node

# Width of the matrices whose product is timed: large enough to keep all cores busy.
_WIDTH = 1024
_SECONDS = 0.3


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine."""

    name: str
    memory_bytes: float

    @property
    def node(self) -> Node | None:
        """The entry of `NODES` with this GPU, or None if there is none."""
        gib = self.memory_bytes / 1e9
        of_kind = [node for node in NODES.values() if node.gpu.split()[0] in self.name]
        # The same GPU is sold with several sizes of memory.
        return next((node for node in of_kind if abs(node.memory_bytes / 1e9 / gib - 1) < 0.15), None)


def first_gpu() -> Gpu | None:
    """Return the first GPU that a run on this machine would use, or None if it would use the CPU."""
    # Without a device file there is no GPU, and the import of torch would cost seconds.
    if not [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Gpu(found.name, float(found.total_memory))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> float:
    """Return the memory that this process may use: that of the machine or of its control group."""
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(machine, float(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control group, or `max`
        return machine


@cache
def product_flops() -> float:
    """Return the FLOP/s of fp32 matrix products on this CPU, measured in a fraction of a second."""
    left = np.ones((_WIDTH, _WIDTH), dtype=np.float32)
    seconds: list[float] = []
    # The fastest of several: other programs can only make a product slower.
    while len(seconds) < 3 or sum(seconds) < _SECONDS:
        begin = time.perf_counter()
        np.matmul(left, left)
        seconds.append(time.perf_counter() - begin)
    return 2 * _WIDTH**3 / min(seconds)
