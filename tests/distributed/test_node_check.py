"""The node check before a job, with real ranks over gloo, one of which has a problem."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.preloaded import python
from tests.support import free_ports

pytestmark = pytest.mark.distributed

CHECK = """
import sys
from offline_align.distributed import node_check as check
{damage}
sys.exit(check.main(sys.argv[1:]))
"""
OTHER_VERSION = "versions = check.versions; check.versions = lambda: versions() | {'torch': '1.0'}"
LATE_CLOCK = "import time; now = time.time; time.time = lambda: now() - 3600"
STOPS_LATER = "import os; check._reduce = lambda *_: os._exit(9)"


def ranks(folder: Path, damage: list[str | None], *options: str) -> list[tuple[int, str]]:
    """Run the check with one rank a node and return exit codes and messages.

    `damage` has one program line for each rank; a rank with None does not start.
    """
    port = str(*free_ports(1))
    processes = []
    for rank, what in enumerate(damage):
        if what is None:
            continue
        environment = {
            "PATH": "/usr/bin:/bin",
            "RANK": str(rank),
            "WORLD_SIZE": str(len(damage)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OFFLINE_ALIGN_NODES": " ".join(f"dgx{n}" for n in range(len(damage))),
        }
        words = [python(), "-c", CHECK.format(damage=what), str(folder), *options]
        processes.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    return [(process.wait(120), process.communicate()[1]) for process in processes]


def test_one_machine_is_checked_alone(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "offline_align.distributed.node_check", str(tmp_path)]
    done = subprocess.run(
        words, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nodes: 1 host, 1 rank," in done.stderr
    wrong = {"PATH": "/usr/bin:/bin", "RANK": "3"}
    done = subprocess.run(words, env=wrong, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert "RANK=3 in the environment: WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing" in done.stderr


def test_good_nodes_pass(tmp_path: Path) -> None:
    done = ranks(tmp_path, ["", ""])
    assert [code for code, _ in done] == [0, 0], done
    assert "2 ranks, 0 GPUs, one all-reduce: all good" in done[0][1]
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (OTHER_VERSION, r"node dgx1 \({host}\): torch is 1.0, elsewhere 2.*; install the same everywhere"),
        (
            LATE_CLOCK,
            r"node dgx1 \({host}\): the clock is -3[56]\d\d s off the others; start its time service",
        ),
    ],
)
def test_the_node_with_a_problem_is_named(tmp_path: Path, damage: str, said: str) -> None:
    done = ranks(tmp_path, ["", damage, ""])
    assert [code for code, _ in done] == [78, 78, 78], done
    line = f"offline-align\\[rank 0\\]: error: {said.format(host=re.escape(socket.gethostname()))}\n"
    assert re.fullmatch(line, done[0][1]), done[0][1]
    assert [text for _, text in done[1:]] == ["", ""]


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    started = time.monotonic()
    ((code, said),) = ranks(tmp_path, ["", None], "--limit=3")
    assert (code, said) == (70, "offline-align[rank 0]: error: node dgx1, rank 1: did not report within 3 s\n")
    assert time.monotonic() - started < 60


def test_a_rank_that_exits_before_the_all_reduce_is_named(tmp_path: Path) -> None:
    (code, said), _ = ranks(tmp_path, ["", STOPS_LATER], "--limit=5")
    assert code == 70
    assert "node dgx1, rank 1: no all-reduce over 2 ranks within 5 s" in said
    assert "dgx0" not in said


def test_a_missing_rank_0_is_named_with_its_address(tmp_path: Path) -> None:
    ((code, said),) = ranks(tmp_path, [None, ""], "--limit=3")
    assert code == 70
    assert "node dgx1, rank 1: no connection to rank 0 at 127.0.0.1:" in said
