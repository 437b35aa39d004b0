"""`settings.jsonl`: what a run was computed with, also if a folder of weights decides it."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.errors import ConfigError
from offline_align.lineage import RunSettings
from offline_align.stages.continuation import begin_or_continue
from tests.training import TINY, continued, samples, write_jsonl


def test_a_model_from_a_folder_is_recorded_as_it_is(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    steps = ["trainer.max_steps=1", "trainer.global_batch_size=4"]
    assert run(["sft", f"run.dir={tmp_path / 'first'}", *TINY, f"data.train={rows}", *steps]) == 0
    words = [*continued(tmp_path / "first"), f"data.train={rows}", *steps]
    assert run(["sft", f"run.dir={tmp_path / 'second'}", *words]) == 0
    (line,) = map(json.loads, (tmp_path / "second" / "settings.jsonl").read_text().splitlines())
    assert (line["given"]["model.num_layers"], line["given"]["model.hidden_size"]) == (2, 32)
    assert line["given"]["template"] == "paper"
    assert "model.num_layers" not in line["settings"], "the weights are compared by their hash"


@pytest.mark.parametrize("change", [{}, {"parents": ["other"]}])
def test_a_record_of_an_earlier_version_does_not_stop_a_run(tmp_path: Path, change: dict[str, Any]) -> None:
    """It has the defaults of the architecture, which had no effect."""
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    given = {"init.from": "base", "model.num_layers": 2}
    old = {"init.from": "a", "model.num_layers": 32, "inputs": ["i"], "parents": ["p"]} | change
    (tmp_path / "settings.jsonl").write_text(json.dumps({"settings": old, "given": given}) + "\n")
    settings = RunSettings("sft", {"init": {"from": "a"}, "model": {"num_layers": 30}}, ["i"], ["p"])
    if change:
        with pytest.raises(ConfigError, match="other content than when this run began"):
            begin_or_continue(tmp_path, settings, given)
    else:
        assert begin_or_continue(tmp_path, settings, given).changes == []
