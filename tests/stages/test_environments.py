"""The result does not depend on locale, umask, home, network, temporary folder, cores or clock."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.training import STEPS, TINY, continued, pairs, samples, train, write_jsonl

# A sitecustomize that refuses connections to other machines. Process groups need local sockets.
NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError("no network")
    return connect(self, address)
socket.socket.connect = refuse
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(socket.gaierror("no network"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("environments")
    rows = [row | {"response": f"naïve 日本 {i}"} for i, row in enumerate(samples(12))]
    base = train("sft", made / "base", write_jsonl(made / "rows.jsonl", rows), "trainer.max_steps=1")
    pair_rows = write_jsonl(made / "pairs.jsonl", pairs())
    train("reward", made / "reward", pair_rows, "trainer.max_steps=1", model=continued(base))
    assert run(label(made, "usual")) == 0
    return made


def label(folder: Path, name: str) -> list[str]:
    inputs = [f"init.from={folder / 'reward'}", f"data.input={folder / 'rows.jsonl'}"]
    return ["label", f"run.dir={folder / name}", *inputs, "data.max_length=128", "run.device=cpu"]


def in_environment(folder: Path, words: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    home = folder / "home"
    home.mkdir(exist_ok=True)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    hostile = {"LC_ALL": "C", "PYTHONPATH": str(folder / "site"), "TMPDIR": "/nonexistent", **environment}
    command = [
        "/bin/sh",
        "-c",
        'umask 077; exec taskset -c 0 "$@"',
        "sh",
        sys.executable,
        "-m",
        "offline_align",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=keep | hostile, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("home", [True, False])
def test_a_hostile_environment_changes_nothing(folder: Path, home: bool) -> None:
    """LC_ALL=C, umask 077, no network, no temporary folder, one core; HOME is unset, or must stay empty."""
    name = f"hostile {home}"
    done = in_environment(folder, label(folder, name), **({"HOME": str(folder / "home")} if home else {}))
    assert done.returncode == 0, done.stderr
    result = (folder / name / "labelled.jsonl").read_bytes()
    expected = [json.loads(line) for line in (folder / "usual" / "labelled.jsonl").read_text("utf-8").splitlines()]
    found = [json.loads(line) for line in result.decode("utf-8").splitlines()]
    scores = [row["reward_raw"] for row in found], [row["reward_raw"] for row in expected]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert [row["response"] for row in found] == [row["response"] for row in expected]
    assert (folder / name / "labelled.jsonl").stat().st_mode & 0o077 == 0
    assert [path for path in (folder / "home").rglob("*") if path.is_file()] == []


def test_a_clock_that_runs_backwards_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.time()
    calls = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: start - 3600.0 * next(calls))
    assert run(label(folder, "backwards")) == 0
    assert (folder / "backwards" / "labelled.jsonl").read_bytes() == (folder / "usual" / "labelled.jsonl").read_bytes()


def test_training_does_not_import_unused_libraries(tmp_path: Path) -> None:
    """`datasets`, pandas and torch's compiler would cost each rank more than a second and 85 MiB."""
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    words = ["sft", f"run.dir={tmp_path / 'out'}", f"data.train={rows}", *TINY, *STEPS, "trainer.max_steps=1"]
    code = "import sys; from offline_align.__main__ import run; assert run(sys.argv[1:]) == 0; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    modules = set(loaded.stdout.split())
    assert "megatron.core.optimizer" in modules
    assert not modules & {"datasets", "pandas", "torch._dynamo", "torch._inductor"}
