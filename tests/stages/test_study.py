"""`scripts/study.sh` with two seeds on a tiny model: the page that says which method to take."""

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
    second = train("reward", tmp_path / "reward_2", preferences, "run.seed=2", model=continued(base))
    environment = os.environ | {
        "RUNS": str(tmp_path / "study"),
        "LABELLED": str(tmp_path / "label" / "labelled.jsonl"),
        "POLICY": str(base),
        "REWARD": str(reward),
        "PROMPTS": str(prompts),
        "SEEDS": "1 2",
        "METHODS": "sft ca",
        "BUDGET": "equal",
        "TOKENS": "3000",
        "BEST_OF": "2",
        "TARGET_REWARD": "1.0",
        "LOW_REWARD": "-1.0",
        "JUDGES": f"judge=reward_model judge.model={second}",
        "OPTIONS": words,
        "GENERATE_OPTIONS": "generate.max_new_tokens=4",
        "EVALUATE_OPTIONS": "evaluate.bootstrap_samples=50",
    }
    script = str(scripts(tmp_path) / "study.sh")
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "study"
    report = json.loads((study / "evaluate" / "report.json").read_text())
    high = ["ca(1.0) seed 1", "ca(1.0) seed 2"]
    low = ["ca(0.0)", "ca(-1.0)"]
    assert set(report["methods"]) == {"start", "sft best of 2", "sft seed 1", "sft seed 2", *high, *low}
    assert set(report["competing"]) == set(report["methods"]) - set(low)
    assert report["study"]["methods"] == {"start": [], "sft best of 2": [], "sft": [1, 2], "ca(1.0)": [1, 2]}
    # Both reward models are called `reward model`, so the other one is named after its folder.
    assert list(report["study"]["judges"]) == ["reward model", "reward model (judge_1)"]
    assert report["seeds"]["methods"]["ca(1.0)"]["seeds"] == [1, 2]
    assert report["following"]["policies"]["ca"]["targets"][0]["target"] == -1.0
    hours = report["study"]["hours"]
    assert max(one["of_dearest"] for one in hours.values()) == 1
    assert hours["start"]["hours"] < hours["sft"]["hours"]
    # A condition makes rows longer, so the same number of tokens takes fewer steps.
    steps = {
        method: json.loads((study / "policies" / f"{method}_1" / "manifest.json").read_text())["extra"]["steps"]
        for method in ("sft", "ca")
    }
    assert 1 <= steps["ca"] < steps["sft"]
