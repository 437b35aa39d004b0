"""Several sessions in one process, one after the other, as `evaluate` with two reward models has them."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.distributed
PROGRAM = """
import os, time
import torch
from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.distributed.setup import session

parallel = ParallelSection(tensor_model_parallel_size=2)
for number in range(4):
    # The first to come would find what the others left in the store at their last session.
    time.sleep(0.4 * ((int(os.environ["RANK"]) + number) % 4))
    with session(parallel, RunSection(dir="unused", device=Device.cpu)) as ranks:
        assert ranks.gather(ranks.rank) == [0, 1, 2, 3]
"""


@pytest.mark.slow
def test_a_session_finds_nothing_of_the_one_before() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--no-python"]
    command = [*launcher, sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
