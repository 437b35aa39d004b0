"""Two jobs with one `run.dir`: the second names the first and changes nothing, for all commands."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from offline_align.__main__ import run
from offline_align.distributed.process import born
from offline_align.distributed.run_lock import FILE_NAME, Holder
from tests.training import continued, labelled, pairs, samples, train, write_jsonl

SHORT = ["data.max_length=64", "run.device=cpu"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    policy = train("sft", folder / "policy", write_jsonl(folder / "rows.jsonl", samples()), "trainer.max_steps=1")
    pair_rows = write_jsonl(folder / "pairs.jsonl", pairs())
    train("reward", folder / "reward", pair_rows, "trainer.max_steps=1", model=continued(policy))
    write_jsonl(folder / "prompts.jsonl", [{"id": "q", "prompt": "Name red"}])
    write_jsonl(folder / "labelled.jsonl", labelled([1.0, 2.0, 3.0, 4.0]))
    answer = {"id": "x", "prompt": "Hi", "response": "a", "finish_reason": "stop", "condition": None}
    write_jsonl(folder / "answers.jsonl", [answer])
    return folder


@pytest.fixture
def other_job() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def words(command: str, given: Path) -> list[str]:
    policy, reward = f"init.from={given / 'policy'}", f"init.from={given / 'reward'}"
    step = ["trainer.max_steps=1", "trainer.global_batch_size=2", *SHORT]
    more = {
        "prepare": [f"data.input={given / 'rows.jsonl'}"],
        "sft": [policy, f"data.train={given / 'rows.jsonl'}", *step],
        "reward": [policy, f"data.train={given / 'pairs.jsonl'}", *step],
        "label": [reward, f"data.input={given / 'rows.jsonl'}", *SHORT],
        "ca": [policy, f"data.train={given / 'labelled.jsonl'}", *step],
        "generate": [policy, f"data.input={given / 'prompts.jsonl'}", "generate.max_new_tokens=2", *SHORT],
        "evaluate": [f"data.input={given / 'answers.jsonl'}", f"judge.model={given / 'reward'}", *SHORT],
        "convert": [policy, "run.device=cpu"],
        "plan": [f"data.input={given / 'labelled.jsonl'}"],
    }
    return [command, *more[command]]


@pytest.mark.parametrize(
    "command", ["prepare", "sft", "reward", "label", "ca", "generate", "evaluate", "convert", "plan"]
)
def test_the_second_job_is_refused(
    given: Path, tmp_path: Path, command: str, other_job: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    own = Holder.this_process(command)
    first = replace(own, process=replace(own.process, pid=other_job, born=born(other_job) or ""))
    (run_dir / FILE_NAME).write_text(json.dumps(asdict(first)))
    arguments = [*words(command, given), f"run.dir={run_dir}"]
    assert run(arguments) == 78
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert (
        f"run.dir={run_dir}: is in use by another job (`{command}`, process {other_job} on {own.process.host}" in line
    )
    assert [path.name for path in run_dir.iterdir()] == [FILE_NAME]
    (run_dir / FILE_NAME).unlink()
    assert run(arguments) == 0
    assert not (run_dir / FILE_NAME).exists()
    (run_dir / FILE_NAME).write_text(json.dumps(asdict(first)))
    assert run(arguments) == 0, "a finished run only says so, and needs no lock"


@pytest.mark.slow
def test_two_commands_at_once(given: Path, tmp_path: Path) -> None:
    """The second command finds the first one running, or its finished run."""
    command = [sys.executable, "-m", "offline_align", *words("prepare", given), f"run.dir={tmp_path / 'run'}"]
    jobs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    said = [job.communicate()[1] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes in ([0, 0], [0, 78]), said
    assert "Traceback" not in "".join(said)
    assert (tmp_path / "run" / "manifest.json").exists() and not (tmp_path / "run" / FILE_NAME).exists()
