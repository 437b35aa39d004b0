"""`scripts/bakeoff.sh` with two methods and two seeds on a tiny model: a report with intervals over seeds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.preloaded import scripts
from tests.training import continued, pairs, samples, train, write_jsonl


@pytest.mark.slow
def test_methods_are_compared_over_seeds_at_equal_tokens(tmp_path: Path) -> None:
    rows, preferences = write_jsonl(tmp_path / "rows.jsonl", samples(24)), write_jsonl(tmp_path / "p.jsonl", pairs())
    base = train("sft", tmp_path / "sft", rows)
    reward = train("reward", tmp_path / "reward", preferences, model=continued(base))
    common = ["data.max_length=128", "run.device=cpu"]
    assert run(["label", f"run.dir={tmp_path / 'label'}", f"init.from={reward}", f"data.input={rows}", *common]) == 0
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Name cat"}, {"id": "b", "prompt": "Owl"}])
    words = " ".join(common)
    environment = os.environ | {
        "RUNS": str(tmp_path / "bakeoff"),
        "LABELLED": str(tmp_path / "label" / "labelled.jsonl"),
        "INIT": str(base),
        "REWARD": str(reward),
        "PROMPTS": str(prompts),
        "SEEDS": "1 2",
        "METHODS": "sft ca",
        "BATCH": "4",
        "TARGET_REWARD": "1.0",
        "TRAIN_OPTIONS": words,
        "GENERATE_OPTIONS": f"{words} generate.max_new_tokens=4",
        "EVALUATE_OPTIONS": f"{words} evaluate.bootstrap_samples=50 judge.second_model={reward}",
    }
    script = str(scripts(tmp_path) / "bakeoff.sh")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bakeoff" / "evaluate" / "report.json").read_text())
    assert report["methods"] == ["sft seed 1", "sft seed 2", "ca(1.0) seed 1", "ca(1.0) seed 2"]
    assert list(report["seeds"]["methods"]) == ["sft", "ca(1.0)"]
    assert report["seeds"]["methods"]["ca(1.0)"]["seeds"] == [1, 2]
    assert report["drift"]["groups"].keys() >= {"labelled SFT rows", "sft seed 1"}
    assert report["cost"]["methods"]["sft seed 1"]["stages_without_time"] == []
    # Here the second reward model is the judge itself, so it must find the same gains.
    for found in report["optimisation"]["methods"].values():
        assert found["second_gain"] == found["gain"]
    # A condition makes rows longer, so the same number of tokens takes fewer steps.
    steps = {
        method: json.loads((tmp_path / "bakeoff" / method / "seed_1" / "manifest.json").read_text())["extra"]["steps"]
        for method in ("sft", "ca")
    }
    assert 1 <= steps["ca"] < steps["sft"]
