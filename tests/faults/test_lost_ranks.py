"""A rank is killed, stopped or raises: all ranks end soon, the lost rank is named, and a restart continues.

The fault is injected into the rank after its third step or batch, through the progress meter that all
loops use.
"""

import json
import os
import re
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.preloaded import python
from tests.training import TINY, continued, metrics, pairs, samples, train, write_jsonl

ALL = os.environ.get("FAULTS") == "all"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
GONE_SECONDS = 30
INJECTION = """
import os, pathlib, signal, time
if "RANK" in os.environ and "FAULT" in os.environ:
    from offline_align.progress import Meter
    kind, rank, marker, often = os.environ["FAULT"].split(":")
    advance, calls = Meter.advance, []
    def faulty(self, *arguments, **more):
        advance(self, *arguments, **more)
        if self.title == "tokenising":
            return
        calls.append(1)
        time.sleep(0.05)
        path = pathlib.Path(marker)
        if len(calls) == 3 and os.environ["RANK"] == rank and (often == "always" or not path.exists()):
            with path.open("a") as file:
                file.write(f"{time.time()}\\n")
            if kind == "raise":
                raise RuntimeError("boom")
            os.kill(os.getpid(), getattr(signal, kind))
            time.sleep(60)
    Meter.advance = faulty
"""
LAUNCHERS = {
    "own": ["-m", "offline_align"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "offline_align"],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(INJECTION)
    rows = write_jsonl(folder / "rows.jsonl", samples(60))
    policy = train("sft", folder / "policy", rows, "trainer.max_steps=1")
    pair_rows = write_jsonl(folder / "pairs.jsonl", pairs())
    train("reward", folder / "reward", pair_rows, "trainer.max_steps=1", model=continued(policy))
    write_jsonl(folder / "prompts.jsonl", [{"id": f"q{i}", "prompt": f"Name {i}"} for i in range(24)])
    for command in ("sft", "label", "generate"):
        assert run([*words(command, folder), f"run.dir={folder / command}"]) == 0
    return folder


def words(command: str, given: Path) -> list[str]:
    policy, reward = f"init.from={given / 'policy'}", f"init.from={given / 'reward'}"
    tiny = [word for word in TINY if word != "debug=true"]
    steps = ["trainer.global_batch_size=4", "trainer.max_steps=8", "trainer.save_interval=2", "optim.lr=1e-3"]
    more = {
        "sft": [f"data.train={given / 'rows.jsonl'}", *tiny, *steps],
        "label": [reward, f"data.input={given / 'rows.jsonl'}", "data.max_length=32", "label.flush_rows=1"],
        "generate": [policy, f"data.input={given / 'prompts.jsonl'}", "generate.batch_size=2"],
    }
    small = {"generate": ["generate.max_new_tokens=2", "data.max_length=64"]}.get(command, [])
    return [command, *more[command], *small, "run.device=cpu"]


def start(given: Path, launcher: str, arguments: list[str], fault: str) -> "subprocess.CompletedProcess[str]":
    ranks = ["launcher.nproc_per_node=2", "parallel.silent_rank_seconds=5"]
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own = {"FAULT": fault, "PYTHONPATH": str(given / "site"), "OMP_NUM_THREADS": "1", "TEST": uuid.uuid4().hex}
    command = [python(), *LAUNCHERS[launcher], *arguments, *ranks]
    done = subprocess.run(command, capture_output=True, text=True, env=keep | own, timeout=300, check=False)
    assert left_over(own["TEST"]) == []
    return done


def left_over(test: str) -> list[str]:
    """Return the processes of a test that are still alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST={test}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


CASES = [
    ("sft", "own", "SIGSTOP", 0),
    ("label", "own", "SIGKILL", 1),
    ("generate", "torchrun", "raise", 1),
]
if ALL:
    CASES = [
        (command, launcher, kind, rank)
        for command in ("sft", "label", "generate")
        for launcher in LAUNCHERS
        for kind in ("SIGSTOP", "SIGKILL", "raise")
        for rank in (0, 1)
    ]


@pytest.mark.parametrize(("command", "launcher", "kind", "rank"), CASES)
def test_all_ranks_end_the_lost_one_is_named_and_a_restart_continues(
    given: Path, tmp_path: Path, command: str, launcher: str, kind: str, rank: int
) -> None:
    arguments = [*words(command, given), f"run.dir={tmp_path / 'run'}"]
    marker = tmp_path / "marker"
    done = start(given, launcher, arguments, f"{kind}:{rank}:{marker}:once")
    seconds = time.time() - float(marker.read_text())
    assert seconds < GONE_SECONDS, done.stderr
    # torchrun does not pass on the exit codes of ranks.
    assert done.returncode == (70 if launcher == "own" else 1), done.stderr
    # Ranks other than 0 write to their own log files.
    said = done.stderr + "".join(log.read_text() for log in sorted((tmp_path / "run").glob("logs/*.log")))
    assert named(said, kind, rank), said
    assert launcher == "torchrun" or "Traceback" not in done.stderr, done.stderr
    again = start(given, launcher, arguments, f"{kind}:{rank}:{marker}:once")
    assert again.returncode == 0, again.stderr
    print(f"{command}, {launcher}, {kind} of rank {rank}: all gone after {seconds:.1f} s")
    if command == "sft":
        assert "continuing after step 2" in again.stderr
        assert metrics(tmp_path / "run") == pytest.approx(metrics(given / "sft"), abs=1e-5)
        return
    name = {"label": "labelled.jsonl", "generate": "generations.jsonl"}[command]
    found = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
    assert found == rows(given / command / name)


def named(said: str, kind: str, rank: int) -> bool:
    if kind == "raise":
        return f"offline-align[rank {rank}]: error: internal error: RuntimeError: boom" in said
    killed = rf"rank {rank} was ended by SIGKILL|rank +: {rank} .*\n +exitcode +: -9"
    silent = rf"rank {rank} \(process \d+ on .*\) has shown no sign of life for 5 s: all ranks end"
    return re.search(silent if kind == "SIGSTOP" else killed, said) is not None


def rows(path: Path) -> list[object]:
    """Return rows with scores to five digits: the number of threads changes the order of sums."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in row.items()} for row in found]


@pytest.mark.skipif(not ALL, reason="three attempts of two ranks: with FAULTS=all")
def test_a_repeated_crash_ends_after_the_allowed_restarts(given: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    # Every attempt saves two more steps, so there must be enough steps for all attempts.
    arguments = [*words("sft", given), f"run.dir={tmp_path / 'run'}", "trainer.max_steps=12"]
    command = LAUNCHERS["torchrun"]
    LAUNCHERS["restarting"] = [*command[:4], "--max-restarts=2", *command[4:]]
    done = start(given, "restarting", arguments, f"raise:1:{marker}:always")
    assert done.returncode == 1
    assert len(marker.read_text().splitlines()) == 3
    done = start(given, "own", arguments, f"raise:1:{marker}:always")
    assert done.returncode == 70, "75 would ask a scheduler for another attempt"
    assert len(marker.read_text().splitlines()) == 4
    assert start(given, "own", arguments, "none:9:x:once").returncode == 0
    assert metrics(tmp_path / "run", "step") == list(range(1, 13))
