"""The cost of a run: whole commands, all attempts and all ranks, by part."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offline_align.distributed.process import seconds_since_birth
from offline_align.lineage import effort, read_manifest
from tests.runs import write_manifest


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("offline_align.lineage.effort.time.monotonic", clock)
        yield clock
    effort.begin(whole_process=False)


def attempt(clock: Clock, run_dir: Path, key: str, seconds: float, ranks: int, finish: bool = False) -> None:
    """Run for `seconds`: 40 % of them in saves, 10 % in a validation inside the saves, the rest in no part."""
    effort.begin(whole_process=False)
    effort.used(ranks, "cuda")
    with effort.recorded(run_dir, key):
        clock.now += seconds / 2
        with effort.part("saves"):
            clock.now += seconds * 0.4
            with effort.part("validation"):
                clock.now += seconds * 0.1
        if finish:
            write_manifest(run_dir, "sft", "key", [], [], [], {"method": "sft", "seconds": 1.0})


def extra_of(run_dir: Path) -> dict[str, Any]:
    manifest = read_manifest(run_dir)
    assert manifest is not None
    return manifest.extra


def test_each_attempt_counts_with_its_number_of_ranks(clock: Clock, tmp_path: Path) -> None:
    attempt(clock, tmp_path, "a", 10.0, ranks=2)
    clock.now += 1000  # time between attempts does not count
    attempt(clock, tmp_path, "b", 7.0, ranks=1)  # an attempt with other settings, which were refused
    attempt(clock, tmp_path, "a", 20.0, ranks=4, finish=True)
    extra = extra_of(tmp_path)
    assert (extra["method"], extra["seconds"], extra["ranks"], extra["device"]) == ("sft", 30.0, 4, "cuda")
    assert extra["attempts"] == 2
    assert effort.rank_seconds(extra) == 100.0
    assert effort.parts(extra) == {"start": 50.0, "saves": 40.0, "validation": 10.0, "hashes": 0.0}
    assert not (tmp_path / effort.FILE_NAME).exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": [{"ranks": 1}]}', '{"a": 3}'])
def test_a_damaged_record_is_replaced(clock: Clock, tmp_path: Path, damage: str) -> None:
    (tmp_path / effort.FILE_NAME).write_text(damage)
    attempt(clock, tmp_path, "a", 20.0, ranks=1, finish=True)
    assert (extra_of(tmp_path)["seconds"], extra_of(tmp_path)["attempts"]) == (20.0, 1)


def test_a_manifest_outside_a_recorded_run_gets_no_effort(tmp_path: Path) -> None:
    write_manifest(tmp_path, "sft", "key", [], [], [], {"seconds": 1.0})
    assert extra_of(tmp_path) == {"seconds": 1.0}


def test_manifests_of_earlier_versions_are_recognised() -> None:
    assert effort.rank_seconds({"seconds": 1800.0, "ranks": 4}) == 7200.0
    assert effort.rank_seconds({"seconds": 3600.0}) == 3600.0
    assert effort.rank_seconds({"rows": 3}) is None
    assert not effort.is_whole({"seconds": 1800.0, "ranks": 4})
    assert effort.parts({"seconds": 1800.0}) == {}


def test_a_killed_attempt_counts_up_to_its_last_update(tmp_path: Path) -> None:
    """The start of the process, before the first line of the program, is included."""
    program = f"""
import os, signal, time
time.sleep(0.5)
from pathlib import Path
from offline_align.lineage import effort
effort.BEAT_SECONDS = 0.05
effort.begin(whole_process=True)
with effort.recorded(Path({str(tmp_path)!r}), "a"), effort.part("steps"):
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], check=False)
    wall = time.monotonic() - started
    assert done.returncode == -9
    ((one,),) = json.loads((tmp_path / effort.FILE_NAME).read_text()).values()
    assert one["parts"]["start"] >= 0.5 and one["parts"]["steps"] > 0.2
    assert sum(one["parts"].values()) <= wall + 0.02  # ticks of the system's clock


def test_a_rank_counts_from_the_start_of_the_launcher_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = {os.getpid(): 3.0, os.getppid(): 8.0}
    monkeypatch.setattr(effort, "seconds_since_birth", ages.__getitem__)
    for name, age in ((f"offline-align-{os.getppid()}", 8.0), ("none", 3.0), (effort.launch_name(), 3.0)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        effort.begin(whole_process=True)
        assert effort.in_words().startswith(f"{age:.0f} s (start ")
    effort.begin(whole_process=False)
    assert effort.in_words().startswith("0 s")
    assert seconds_since_birth(2**22 + 1) == 0.0
