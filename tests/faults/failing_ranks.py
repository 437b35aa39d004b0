"""Run one rank of a two-rank command in which a rank fails: `python -m tests.faults.failing_ranks CASE`.

Gloo groups are patched to behave like NCCL: destroying them, and the exit of Python, wait for the
other rank.
"""

import atexit
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from offline_align import __main__ as command_line
from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.distributed.setup import Ranks, session
from offline_align.errors import ConfigError, DataError

RANK = int(os.environ["RANK"])
SILENT_SECONDS = 4.0
UNWINDING_SECONDS = 3.0
"""Longer than the other ranks wait before they exit after a failed one."""


def end_as_nccl_does() -> None:
    """Make the end of process groups, and of a process that has some, wait for the other rank.

    Signal handlers do not run during this wait.
    """
    torch_dist: Any = dist
    destroy, begun = torch_dist.destroy_process_group, itertools.count()

    def wait() -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch_dist.PrefixStore(f"nccl/{next(begun)}", torch_dist.TCPStore(address, port))
        store.set(str(RANK), "ends")
        store.wait([str(1 - RANK)], timedelta(minutes=10))

    def destroy_process_group(*group: Any) -> None:
        wait()
        destroy(*group)

    def at_exit() -> None:
        if dist.is_initialized():
            wait()

    torch_dist.destroy_process_group = destroy_process_group
    atexit.register(at_exit)


def others(ranks: Ranks) -> None:
    """Wait for a rank that never arrives."""
    ranks.barrier()


def boom(ranks: Ranks) -> None:
    raise RuntimeError("boom")


def bad_data(ranks: Ranks) -> None:
    raise DataError("rows.jsonl:3: prompt: is missing")


def bad_disk(ranks: Ranks) -> None:
    raise OSError(28, "No space left on device", "checkpoints")


def stop(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def leave(ranks: Ranks) -> None:
    """Reach the end of the session, where the process groups are destroyed."""


def leave_later(ranks: Ranks) -> None:
    time.sleep(2 * SILENT_SECONDS)


def refuse(ranks: Ranks) -> None:
    """Fail on all ranks with an error of rank 0, which takes some time before it reports the error."""

    def work() -> None:
        raise ConfigError("model=huge: is too large")

    try:
        ranks.from_main(work)
    finally:
        if ranks.is_main:
            time.sleep(UNWINDING_SECONDS)


CASES: dict[str, tuple[Callable[[Ranks], None], Callable[[Ranks], None]]] = {
    "rank 0 raises": (boom, others),
    "rank 1 raises": (others, boom),
    "bad data": (others, bad_data),
    "full disk": (bad_disk, others),
    "early stop": (others, stop),
    "early stop of rank 0": (stop, others),
    "raises after the others": (leave, boom),
    "rank 0 refuses": (refuse, refuse),
    "both raise": (boom, boom),
    "nobody fails": (leave_later, leave),
}


def main(case: str) -> None:
    parallel = ParallelSection(silent_rank_seconds=SILENT_SECONDS)

    def dispatch(arguments: list[str], limit: Callable[[str | None], None]) -> int:
        # Two sessions, because the second must not use the keys of the first in the store.
        for work in (leave, CASES[case][RANK]):
            with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
                ranks.barrier()
                work(ranks)
        return 0

    end_as_nccl_does()
    command_line._dispatch = dispatch
    command_line.main()


if __name__ == "__main__":
    main(sys.argv[1])
