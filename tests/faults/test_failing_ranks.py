"""A rank fails while the others wait for it as in NCCL: its error is reported, and all ranks exit with its code."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.preloaded import python
from tests.support import free_ports

ALL = os.environ.get("FAULTS") == "all"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
GONE_SECONDS = 150
"""Includes the start of two ranks on a busy machine. Ranks that wait for each other would take ten minutes."""
BOOM = "internal error: RuntimeError: boom; debug=true shows where"


def start(case: str, folder: Path) -> list["subprocess.CompletedProcess[str]"]:
    """Run two ranks as srun does: rank 0 hosts the store, and no launcher ends one rank after the other."""
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(folder / str(rank))}
        keep = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
        command = [python(), "-m", "tests.faults.failing_ranks", case]
        environment = keep | shared | own | {"OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    deadline = time.monotonic() + GONE_SECONDS
    try:
        said = [rank.communicate(timeout=max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    seconds = time.monotonic() - deadline + GONE_SECONDS
    print(f"{case}: all gone after {seconds:.1f} s")
    return [subprocess.CompletedProcess(r.args, r.returncode, *text) for r, text in zip(ranks, said, strict=True)]


def errors(rank: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line.partition(": error: ")[2] for line in rank.stderr.splitlines() if ": error: " in line]


CASES: list[tuple[str, int, dict[int, str]]] = [
    ("rank 0 raises", 70, {0: BOOM}),
    # Only rank 0 reports an early stop.
    ("early stop", 75, {}),
    ("raises after the others", 70, {1: BOOM}),
    ("rank 0 refuses", 78, {0: "model=huge: is too large"}),
    ("rank 1 raises", 70, {1: BOOM}),
    ("bad data", 65, {1: "rows.jsonl:3: prompt: is missing"}),
    ("full disk", 74, {0: "checkpoints: No space left on device"}),
    ("early stop of rank 0", 75, {0: "stopped by SIGTERM; finished work is on disk: run the command again"}),
    ("both raise", 70, {0: BOOM, 1: BOOM}),
]


@pytest.mark.parametrize(("case", "code", "said"), CASES if ALL else CASES[:4])
def test_all_ranks_end_with_the_code_of_the_one_that_fails(
    tmp_path: Path, case: str, code: int, said: dict[int, str]
) -> None:
    ranks = start(case, tmp_path)
    assert [rank.returncode for rank in ranks] == [code, code], [rank.stderr for rank in ranks]
    assert {number: lines[0] for number, rank in enumerate(ranks) if (lines := errors(rank))} == said
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert {record["message"]["errorCode"] for record in records} == {code}
    # A rank that only follows another one writes no error file.
    assert len(records) == (len(said) or 1)


def test_ranks_that_succeed_wait_for_each_other(tmp_path: Path) -> None:
    ranks = start("nobody fails", tmp_path)
    assert [(rank.returncode, errors(rank)) for rank in ranks] == [(0, []), (0, [])], [rank.stderr for rank in ranks]
    assert "has ended with exit code" not in ranks[0].stderr + ranks[1].stderr
    assert list(tmp_path.iterdir()) == []
