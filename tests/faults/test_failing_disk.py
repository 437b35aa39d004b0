"""A disk that fails at some file change: one error line, exit code 74, only whole files, and a retry that succeeds.

`FAULTS=all` lets every change of every command fail. Without it, a few changes of each command fail.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.faults.disk import FailingDisk
from tests.faults.forks import NEVER
from tests.training import pairs, samples, train, write_jsonl

ALL = os.environ.get("FAULTS") == "all"
POINTS = 4
COMMANDS = ("prepare", "label", "generate", "evaluate", "convert")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the failing disk"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the inputs of all commands."""
    folder = tmp_path_factory.mktemp("disk")
    rows = write_jsonl(folder / "rows.jsonl", samples(6))
    (folder / "bad.jsonl").write_text(rows.read_text() + "nonsense\n")
    policy = train("sft", folder / "policy", rows, "trainer.max_steps=1")
    start = [f"init.from={policy}", "data.max_length=128", "run.device=cpu", "trainer.max_steps=1"]
    train("reward", folder / "reward", write_jsonl(folder / "pairs.jsonl", pairs()), *start, model=[])
    write_jsonl(folder / "prompts.jsonl", [{"id": f"q{i}", "prompt": f"Name {i}"} for i in range(2)])
    for name in "ab":
        answer = {"id": "x", "prompt": "Hi", "response": name, "finish_reason": "stop", "condition": None}
        write_jsonl(folder / f"{name}.jsonl", [answer])
    return folder


@pytest.fixture(scope="module")
def disk(given: Path) -> Iterator[FailingDisk]:
    (given / "out").mkdir()
    made = FailingDisk(given, given / "out")
    with made:
        yield made


def words(command: str, given: Path) -> list[str]:
    bad = [f"data.input={given / 'bad.jsonl'}", "data.on_bad_row=skip"]
    cpu = ["run.device=cpu"]
    short = ["data.max_length=64", *cpu]
    ask = [f"data.input={given / 'prompts.jsonl'}", f"init.from={given / 'policy'}", "generate.max_new_tokens=2"]
    answers = f"data.input=[{given / 'a.jsonl'},{given / 'b.jsonl'}]"
    judge = ["judge=reward_model", f"judge.model={given / 'reward'}", "evaluate.bootstrap_samples=10"]
    more = {
        "prepare": [*bad, "prepare.valid_fraction=0.3"],
        "label": [*bad, f"init.from={given / 'reward'}", *short],
        "generate": [*ask, *short],
        "evaluate": [answers, *judge, *short],
        "convert": [f"init.from={given / 'policy'}", *cpu],
    }
    return [command, f"run.dir={given / 'out' / 'run'}", *more[command]]


def lasting(folder: Path) -> dict[str, bytes]:
    """Return the files of a run that are equal in every attempt: no caches, and no time stamps in names or content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    varying = ("manifest.json", "config.yaml", "quarantine.jsonl")
    folders = ("cache", "journal", "hugging", "tensorboard")
    return {n: content for n, content in named.items() if not n.startswith(folders) and n not in varying}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fails_costs_nothing(command: str, given: Path, disk: FailingDisk) -> None:
    run_dir = given / "out" / "run"
    whole = disk.on_disk(words(command, given))
    assert whole.code == 0, whole.said
    expected = lasting(run_dir)
    shutil.rmtree(run_dir)
    count = whole.changes
    points = range(count) if ALL else [(2 * k + 1) * count // (2 * POINTS) for k in range(POINTS)]
    for point in points:
        for error, times in ((errno.EIO, 1), (errno.ENOSPC, NEVER), (errno.EROFS, NEVER)):
            if not ALL and (point + error) % 3:
                continue
            ended = disk.on_disk(words(command, given), point, error, times)
            place = f"{command}, change {point}, {errno.errorcode[error]}: {ended}"
            said = [line for line in ended.said.splitlines() if "error:" in line]
            # A single failure may have no effect, for example when a folder is created that already exists.
            assert ended.code == 74 or (ended.code == 0 and times == 1), place
            assert len(said) == (ended.code == 74), place
            assert all(str(given / "out") in line and "internal" not in line for line in said), place
            assert "Traceback" not in ended.said, place
            found = lasting(run_dir)
            assert all(content == expected[name] for name, content in found.items() if name in expected), place
            assert disk.on_disk(words(command, given)).code == 0, place
            assert lasting(run_dir) == expected, place
            # Failed attempts leave no event files behind, which TensorBoard would show as further curves.
            assert len(list(run_dir.glob("tensorboard/*"))) <= 1, place
            shutil.rmtree(run_dir)


def test_a_small_file_system_that_grows(given: Path) -> None:
    """The same on a real file system, if this user may mount one."""
    folder = given / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("no right to mount a file system")
    try:
        write_jsonl(given / "many.jsonl", [row | {"response": f"{i}{'x' * 200}"} for i, row in enumerate(samples(600))])
        command = ["prepare", f"run.dir={folder / 'run'}", f"data.input={given / 'many.jsonl'}"]
        assert run(command) == 74
        assert not list((folder / "run").glob("sft_*.jsonl"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        assert run(command) == 0
    finally:
        subprocess.run(["umount", str(folder)], check=False)
