"""The run lock: one job writes into a run folder, and locks of dead jobs are replaced."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from offline_align.distributed import run_lock
from offline_align.distributed.process import born
from offline_align.distributed.run_lock import FILE_NAME, Holder
from offline_align.errors import ConfigError, StorageError

HOLD = """
import sys, time, pathlib
from offline_align.distributed.run_lock import run_lock
from offline_align.errors import ConfigError
run_dir, start = pathlib.Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, start - time.time()))
try:
    with run_lock(run_dir, "sft"):
        print("won", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print(error)
"""


def hold(run_dir: Path, start: float = 0.0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(run_dir), str(start)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def dead(**changes: Any) -> Holder:
    """Return a holder that has ended: its process id now belongs to another process."""
    own = Holder.this_process("sft")
    return replace(own, process=replace(own.process, **{"born": "1", **changes}))


def put(run_dir: Path, holder: Holder) -> Path:
    path = run_dir / FILE_NAME
    path.write_text(json.dumps(asdict(holder)))
    return path


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Holder:
    """Return a holder on another machine, with short intervals between heartbeats."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 0.4)
    return dead(host="node7", machine="another boot")


@pytest.mark.slow
def test_of_two_jobs_started_at_once_one_wins_twenty_times(tmp_path: Path) -> None:
    for attempt in range(20):
        run_dir = tmp_path / str(attempt)
        if attempt % 2:  # every second time with a lock left by kill -9
            run_dir.mkdir()
            put(run_dir, dead())
        jobs = [hold(run_dir, time.time() + 0.5) for _ in range(2)]
        said = [job.stdout.readline() for job in jobs if job.stdout is not None]
        assert sorted(line == "won\n" for line in said) == [False, True], said
        winner = jobs[said.index("won\n")]
        (refused,) = [line for line in said if line != "won\n"]
        assert refused.startswith(f"run.dir={run_dir}: is in use by another job (`sft`, process {winner.pid} on ")
        for job in jobs:
            job.communicate("")
        assert list(run_dir.iterdir()) == []


def test_a_lock_left_by_kill_9_is_taken_over_at_once(tmp_path: Path, caplog: Any) -> None:
    job = hold(tmp_path)
    assert job.stdout is not None and job.stdout.readline() == "won\n"
    said = rf"process {job.pid} on .*, since 2\d\d\d-.*wait for it or stop it"
    with pytest.raises(ConfigError, match=said), run_lock.run_lock(tmp_path, "sft"):
        pass
    job.kill()  # and not waited for: a zombie counts as dead
    while born(job.pid) is not None:
        time.sleep(0.01)
    started = time.monotonic()
    with run_lock.run_lock(tmp_path, "sft"):
        assert json.loads((tmp_path / FILE_NAME).read_text())["process"]["pid"] == os.getpid()
    assert time.monotonic() - started < 1
    assert f"process {job.pid}" in caplog.text and "taken over" in caplog.text
    job.communicate()


def test_a_reused_process_id_is_another_process(tmp_path: Path) -> None:
    put(tmp_path, dead(pid=1))
    with run_lock.run_lock(tmp_path, "sft"):
        pass


def test_a_living_holder_elsewhere_is_respected(tmp_path: Path, elsewhere: Holder) -> None:
    path = put(tmp_path, elsewhere)
    beats = iter(range(1000))

    def touched(path: Path) -> int:
        return next(beats) // 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "_last_beat", touched)
        with pytest.raises(ConfigError, match="on node7"), run_lock.run_lock(tmp_path, "sft"):
            pass
    assert path.exists()


@pytest.mark.parametrize("torn", [False, True])
def test_a_holder_elsewhere_without_heartbeat_is_dead_after_a_while(
    tmp_path: Path, elsewhere: Holder, torn: bool, caplog: Any
) -> None:
    path = put(tmp_path, elsewhere)
    if torn:
        path.write_text("")
    started = time.monotonic()
    with run_lock.run_lock(tmp_path, "sft"):
        assert 0.4 <= time.monotonic() - started < 5
    assert "checking whether that job is alive" in caplog.text and "taken over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_holder_touches_its_lock(tmp_path: Path, elsewhere: Holder) -> None:
    with run_lock.run_lock(tmp_path, "sft"):
        before = run_lock._last_beat(tmp_path / FILE_NAME)
        time.sleep(0.3)
        assert before != run_lock._last_beat(tmp_path / FILE_NAME)


def test_a_holder_that_was_stopped_and_replaced_ends(tmp_path: Path) -> None:
    """Otherwise both jobs would write."""
    code = HOLD.replace(
        "run_dir, start", "import offline_align.distributed.run_lock as l; l.BEAT_SECONDS = 0.05\nrun_dir, start"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stdout.readline() == "won\n"
    put(tmp_path, Holder.this_process("fa"))
    assert job.wait(10) == StorageError.exit_code
    assert (tmp_path / FILE_NAME).exists()
    job.communicate()


def test_the_lock_of_another_job_is_not_removed_at_the_end(tmp_path: Path) -> None:
    with run_lock.run_lock(tmp_path, "sft"):
        other = put(tmp_path, Holder.this_process("fa"))
    assert other.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), run_lock.run_lock(tmp_path / "file" / "run", "sft"):
        pass
