"""What vLLM needs to run in the process of the trainer and to share its GPU."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

# Share of the memory that is free when the engine is loaded. The rest is for what neither side gives
# back, and for the trainer's weights while they are handed over.
_SHARE_OF_FREE_MEMORY = 0.8
# torch's setting, under its new and its old name.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDABLE, _NOT_EXPANDABLE = "expandable_segments:True", "expandable_segments:False"


def arguments(device: torch.device) -> dict[str, Any]:
    """Return the arguments of an engine that shares process and GPU with the trainer."""
    free, total = torch.cuda.mem_get_info(device)
    return {
        # The ranks are those of the trainer; each has its own engine.
        "distributed_executor_backend": "external_launcher",
        "enable_sleep_mode": True,
        "gpu_memory_utilization": _SHARE_OF_FREE_MEMORY * free / total,
        # A cached prefix would have been computed with the weights of an earlier iteration.
        "enable_prefix_caching": False,
        # The probabilities after division by the temperature.
        "logprobs_mode": "processed_logprobs",
    }


@contextlib.contextmanager
def environment(device: torch.device) -> Iterator[None]:
    """Give vLLM the rank of this process, which it then uses instead of starting another process."""
    set_expandable_segments(False)
    wanted = {
        "RANK": str(torch.distributed.get_rank()),
        "WORLD_SIZE": str(torch.distributed.get_world_size()),
        "LOCAL_RANK": str(device.index or 0),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # It takes the process group that exists, but requires an address.
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "localhost"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "0"),
    }
    # It also refuses the value that `set_expandable_segments` has just changed.
    wanted |= {n: os.environ[n].replace(_EXPANDABLE, _NOT_EXPANDABLE) for n in _ALLOCATOR if n in os.environ}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def set_expandable_segments(on: bool) -> None:
    """Switch torch's expandable segments, if they are in use: vLLM's memory that can sleep does not support them.

    They are off while vLLM is awake, and on for the trainer while it sleeps.
    """
    if any(_EXPANDABLE in os.environ.get(name, "") for name in _ALLOCATOR):
        allocator: Any = torch._C
        allocator._accelerator_setAllocatorSettings(_EXPANDABLE if on else _NOT_EXPANDABLE)
