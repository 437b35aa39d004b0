"""The owner of a run: what it reads is resolved and hashed once, and its manifest says what was read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from offline_align.__main__ import run
from offline_align.config.runs import ModelRun
from offline_align.convert.source import ModelSource
from offline_align.lineage import files, read_manifest
from offline_align.stages.origin import resolve
from tests.runs import job
from tests.training import TINY, labelled, samples, write_jsonl


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each file is hashed, by its name."""
    found: Counter[str] = Counter()
    plain = files.file_sha256

    def counted(path: Path) -> str:
        found[path.name] += 1
        return plain(path)

    monkeypatch.setattr(files, "file_sha256", counted)
    return found


def test_inputs_are_hashed_once(tmp_path: Path, hashed: Counter[str]) -> None:
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled([0.5, -0.5] * 7))
    words = ["plan", f"run.dir={tmp_path / 'plan'}", f"data.input={rows}", "model.tokenizer=demo"]
    assert run(words) == 0
    assert hashed["labelled.jsonl"] == 1
    manifest = read_manifest(tmp_path / "plan")
    assert manifest is not None
    assert [Path(record.path).name for record in manifest.inputs] == ["labelled.jsonl"]


def test_the_model_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[frozenset[str]] = []

    def counted(config: ModelRun, explicit: frozenset[str]) -> ModelSource:
        calls.append(explicit)
        return resolve(config, explicit)

    monkeypatch.setattr("offline_align.stages.job.resolve", counted)
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    assert run(["sft", f"run.dir={tmp_path / 'run'}", *TINY, f"data.train={rows}", "trainer.max_steps=1"]) == 0
    assert len(calls) == 1


def test_what_hangs_on_the_data_is_derived_again(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", labelled([r] * 14)) for name, r in (("one", 0.5), ("two", 1.0)))
    plan = job("plan", [f"run.dir={tmp_path / 'plan'}", f"data.input={one}", "model.tokenizer=demo"])
    before = plan.settings.key
    plan.change_data(input=str(two))
    assert plan.inputs == [two]
    assert plan.settings.key != before


def test_a_finished_run_of_another_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled([0.5, -0.5] * 7))
    place = f"run.dir={tmp_path / 'plan'}"
    assert run(["plan", place, f"data.input={rows}", "model.tokenizer=demo"]) == 0
    assert run(["prepare", place, "data.input=demo"]) == 78
    assert "holds a finished run of `plan`" in capsys.readouterr().err
    assert json.loads((tmp_path / "plan" / "manifest.json").read_text())["stage"] == "plan"
