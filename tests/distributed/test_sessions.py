"""Sessions that share a store: restarts, and several in one process, as in `evaluate` with two reward models."""

import os
import subprocess

import pytest

from tests.preloaded import python

pytestmark = pytest.mark.distributed
PROGRAM = """
import os, time
import torch
from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.distributed.setup import session

parallel = ParallelSection(tensor_model_parallel_size=2)
for number in range(4):
    # Without a fresh prefix, the first rank would find keys from the previous session of the others.
    time.sleep(0.4 * ((int(os.environ["RANK"]) + number) % 4))
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        assert ranks.gather(ranks.rank) == [0, 1, 2, 3]
"""


CRASHING = """
import os, sys, time
from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.distributed.setup import session

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
# A different rank arrives first in each attempt.
time.sleep(0.4 * ((rank + attempt) % 2))
with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)) as ranks:
    assert ranks.gather(rank) == [0, 1]
    if attempt < 2 and rank == 1:
        # Exit without telling the other ranks, as after a kill.
        os._exit(1)
    ranks.barrier()
"""


def start(program: str, *options: str) -> "subprocess.CompletedProcess[str]":
    launcher = [python(), "-m", "torch.distributed.run", "--standalone", "--no-python", *options]
    command = [*launcher, python(), "-c", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.slow
def test_a_session_ignores_keys_of_the_previous_one() -> None:
    done = start(PROGRAM, "--nproc-per-node=4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_restart_ignores_keys_of_the_previous_attempt() -> None:
    done = start(CRASHING, "--nproc-per-node=2", "--max-restarts=2")
    assert done.returncode == 0, done.stderr
