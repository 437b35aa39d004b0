"""Signals and `trainer.max_time` while rows are read, tokenised and prepared: exit 75 at once."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.data import tokenize
from offline_align.data.preparation import write_rows
from offline_align.data.template import Renderer
from offline_align.distributed import rendezvous
from tests.support import free_ports
from tests.training import TINY, labelled, samples, write_jsonl

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", samples(20))


def sft(tmp_path: Path, rows: Path) -> list[str]:
    words = [word for word in TINY if word != "debug=true"]
    return ["sft", f"run.dir={tmp_path / 'out'}", f"data.train={rows}", *words, "trainer.global_batch_size=4"]


@pytest.mark.parametrize("owner, name", [(tokenize, "_render"), (Renderer, "encode"), (tokenize, "_fitted")])
@pytest.mark.parametrize("number", SIGNALS)
def test_tokenising_stops_at_once(
    tmp_path: Path, rows: Path, number: signal.Signals, owner: Any, name: str, monkeypatch: Any, capsys: Any
) -> None:
    original = getattr(owner, name)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert run(sft(tmp_path, rows)) == 75
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert list((tmp_path / "out" / "cache").iterdir()) == []
    assert run([*sft(tmp_path, rows), "trainer.max_steps=1"]) == 0


@pytest.mark.parametrize("way", [*SIGNALS, "trainer.max_time"])
def test_preparing_stops_at_once(tmp_path: Path, rows: Path, way: Any, monkeypatch: Any, capsys: Any) -> None:
    def interrupted(*arguments: Any) -> Any:
        if isinstance(way, signal.Signals):
            os.kill(os.getpid(), way)
        else:
            signal.pause()
        return write_rows(*arguments)

    words = ["prepare", f"run.dir={tmp_path / 'out'}", f"data.input={rows}"]
    limit = ["trainer.max_time=1"] if way == "trainer.max_time" else []
    with monkeypatch.context() as patch:
        patch.setattr("offline_align.stages.prepare.write_rows", interrupted)
        assert run([*words, *limit]) == 75
    assert f"stopped by {way if limit else way.name}" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "effort.json"}
    # The limit does not affect the result, so the same folder continues without it.
    assert run(words) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_another_reports_it_and_stops_at_once(
    tmp_path: Path, rows: Path, rank: int, monkeypatch: Any, capsys: Any
) -> None:
    (port,) = free_ports(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "_FIRST_MESSAGE_SECONDS", 0.05)

    said: list[str] = []

    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(rendezvous.logger, "handlers", [Stop()])
    assert run(sft(tmp_path, rows)) == 75
    assert f"rank {rank} waits for rank {1 - rank} at 127.0.0.1:{port}" in said[0]
    assert ("stopped by SIGTERM" in capsys.readouterr().err) == (rank == 0)


def test_reading_stops_at_once(tmp_path: Path, rows: Path, monkeypatch: Any) -> None:
    from offline_align.data import jsonl

    original = jsonl.parse_object

    def interrupted(raw: bytes) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(raw)

    monkeypatch.setattr(jsonl, "parse_object", interrupted)
    assert run(sft(tmp_path, rows)) == 75


def other_commands(tmp_path: Path, rows: Path) -> dict[str, tuple[list[str], str]]:
    """Return commands without a loop that checks for stops, each with the function to interrupt."""
    labels = write_jsonl(tmp_path / "labelled.jsonl", labelled([1.0, 2.0, 3.0]))
    answer = {"id": "x", "prompt": "Hi", "response": "a", "finish_reason": "stop", "condition": None}
    answers = write_jsonl(tmp_path / "answers.jsonl", [answer])
    out = f"run.dir={tmp_path / 'out'}"
    return {
        "plan": (["plan", out, f"data.input={labels}"], "offline_align.stages.plan.plan"),
        "evaluate": (
            ["evaluate", out, "judge=ground_truth", f"data.input={answers}"],
            "offline_align.stages.evaluate.load_comparison",
        ),
        "verify": (["verify", f"run.dir={tmp_path}"], "offline_align.stages.verify.verify"),
    }


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", ["plan", "evaluate", "verify"])
def test_other_commands_stop_at_once(
    tmp_path: Path, rows: Path, command: str, number: signal.Signals, monkeypatch: Any, capsys: Any
) -> None:
    words, function = other_commands(tmp_path, rows)[command]

    def interrupted(*_: Any) -> Any:
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(function, interrupted)
        assert run(words) == 75
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / ".lock").exists()
    assert command != "plan" or run(words) == 0
