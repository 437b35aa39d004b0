"""The first line of a command says what runs, where to and from what."""

from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.lineage import effort
from offline_align.stages.first_line import first_line
from tests.runs import job
from tests.training import labelled, write_jsonl


def line(stage: str, *words: str) -> str | None:
    return first_line(stage, job(stage, list(words)).config)


def test_stage_folder_model_and_data_are_named() -> None:
    assert line("sft", "run.dir=runs/sft", "init.from=models/base", "data.train=rows.jsonl") == (
        "sft: run.dir=runs/sft, init.from=models/base, data.train=rows.jsonl"
    )
    many = line("label", "run.dir=out", "data.input=[a,b,c,d]", "launcher.nproc_per_node=2")
    assert many == "label: run.dir=out, data.input=[a, b, c, ... (4 in all)], 2 ranks on this machine"
    judged = line("evaluate", "run.dir=out", "data.input=a.jsonl", "judge=openai", "judge.model=gpt")
    assert judged == "evaluate: run.dir=out, judge.model=gpt, data.input=a.jsonl, judge=openai"


@pytest.mark.parametrize("words", [["sft", "run.dir=out", "dry_run=true"], ["plan"], ["verify", "run.dir=out"]])
def test_dry_runs_and_printed_results_have_no_such_line(words: list[str]) -> None:
    assert line(*words) is None


def test_ranks_that_this_program_has_started_do_not_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "started_by_this_program", lambda: True)
    assert line("sft", "run.dir=out") is None


def test_it_comes_before_the_model_is_opened(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def problems(job: Any) -> tuple[list[str], None]:
        seen.append(list(caplog.messages))
        return ["stop here"], None

    monkeypatch.setattr("offline_align.stages.requirements.problems", problems)
    rows = write_jsonl(tmp_path / "rows.jsonl", labelled([1.0, 2.0]))
    assert run(["fa", f"run.dir={tmp_path / 'out'}", f"data.train={rows}", "model=demo"]) == 78
    assert seen == [[f"fa: run.dir={tmp_path / 'out'}, data.train={rows}"]]
