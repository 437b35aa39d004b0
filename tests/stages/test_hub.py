"""Data sets on the Hub as the input of stages. A local folder takes the place of the Hub."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.stages.hub import fetch_data_sets
from tests.runs import job
from tests.training import STEPS, TINY, metrics, samples, train, write_jsonl


def published(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Write the rows as a published data set and return its name."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows)
    return f"hf:{folder}"


def as_dolly() -> list[dict[str, Any]]:
    return [{"instruction": s["prompt"], "context": "", "response": s["response"]} for s in samples()]


def test_training_on_a_data_set_equals_training_on_its_rows(tmp_path: Path) -> None:
    name = published(tmp_path / "set", as_dolly())
    expected = train("sft", tmp_path / "plain", write_jsonl(tmp_path / "rows.jsonl", samples()))
    command = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={name}", *TINY, *STEPS]
    assert run(command) == 0
    assert metrics(tmp_path / "run") == metrics(expected)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    [file] = (tmp_path / "run" / "cache" / "hub").iterdir()
    assert file.name in json.dumps(manifest["inputs"])
    # A second run reads the file, even if the data set no longer exists.
    (tmp_path / "set" / "train.jsonl").unlink()
    assert run(command) == 0


def test_an_unreadable_data_set_is_reported_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train=hf:{tmp_path}", *TINY]
    assert run(command) == 78
    assert f"data.train=hf:{tmp_path}: cannot be loaded" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.jsonl"))
    assert run([*command, "dry_run=true"]) == 0


def test_rows_that_do_not_fit_are_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = published(tmp_path / "set", [{"text": "only a text"}, *as_dolly()])
    command = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={name}", *TINY, *STEPS]
    assert run(command) == 65
    assert f"{name}:1: text: plain text without turns" in capsys.readouterr().err
    assert run([*command, "data.on_bad_row=skip"]) == 0
    [quarantine] = (tmp_path / "run" / "cache" / "hub").glob("*.quarantine.jsonl")
    assert "only a text" in quarantine.read_text()


def test_sft_learns_nothing_that_people_rejected_or_rated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = [row | {"label": number > 3} for number, row in enumerate(as_dolly())]
    made = job("sft", [f"run.dir={tmp_path / 'run'}", f"data.train={published(tmp_path / 'judged', judged)}", *TINY])
    fetch_data_sets(made)
    assert len(Path(made.config.data.train).read_text().splitlines()) == len(judged) - 4
    name = published(tmp_path / "rated", [row | {"rating": 3} for row in as_dolly()])
    assert run(["sft", f"run.dir={tmp_path / 'other'}", f"data.train={name}", *TINY]) == 65
    assert f"{name}: its answers are rated, so not all are to be learned; read it with `prepare`" in (
        capsys.readouterr().err
    )


def test_prompts_stay_as_they_are(tmp_path: Path) -> None:
    name = published(tmp_path / "set", [{"prompt": "a", "more": 1}, {"prompt": "b", "id": "own", "more": 2}])
    words = [f"run.dir={tmp_path / 'run'}", f"data.input=[{name},{write_jsonl(tmp_path / 'x.jsonl', [])}]"]
    generate = job("generate", words)
    fetch_data_sets(generate)
    first, second = generate.config.data.input
    assert [json.loads(line) for line in Path(first).read_text().splitlines()] == [
        {"prompt": "a", "more": 1, "id": f"{name}:1"},
        {"prompt": "b", "more": 2, "id": "own"},
    ]
    assert second == str(tmp_path / "x.jsonl")


def test_other_ranks_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = published(tmp_path / "set", as_dolly())
    first, second = (job("sft", [f"run.dir={tmp_path / 'run'}", f"data.train={name}"]) for _ in range(2))
    monkeypatch.setenv("RANK", "1")
    waiting = threading.Thread(target=fetch_data_sets, args=[second])
    waiting.start()
    time.sleep(0.5)
    assert second.config.data.train == name
    monkeypatch.setenv("RANK", "0")
    fetch_data_sets(first)
    waiting.join(timeout=30)
    assert second.config.data.train == first.config.data.train != name


def test_plan_needs_a_run_folder_for_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "data.input=hf:owner/set"]) == 78
    assert "data.input=hf:owner/set: give run.dir or data.cache_dir" in capsys.readouterr().err
