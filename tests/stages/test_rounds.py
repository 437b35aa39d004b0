"""`scripts/rounds.sh` with a tiny model: the report over rounds, a kill in between, and the limits."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from offline_align.lineage import read_manifest
from tests.preloaded import scripts
from tests.training import continued, pairs, samples, train, write_jsonl

SHORT = "data.max_length=64 run.device=cpu"
ROUNDS = 2


class Script:
    """The script with the models of one folder."""

    def __init__(self, folder: Path) -> None:
        base = train("sft", folder / "sft", write_jsonl(folder / "rows.jsonl", samples(12)))
        pair_rows = write_jsonl(folder / "pairs.jsonl", pairs())
        reward = train("reward", folder / "reward", pair_rows, model=continued(base))
        prompts = write_jsonl(
            folder / "prompts.jsonl", [{"id": "a", "prompt": "Name cat"}, {"id": "b", "prompt": "Owl"}]
        )
        self.folder = folder
        self.program = str(scripts(folder) / "rounds.sh")
        self.environment = os.environ | {
            "POLICY": str(base),
            "REWARD": str(reward),
            "TRAIN_PROMPTS": str(folder / "rows.jsonl"),
            "PROMPTS": str(prompts),
            "ROUNDS": str(ROUNDS),
            "PROMPTS_PER_ROUND": "6",
            "SAMPLES": "3",
            "OPTIONS": SHORT,
            "SAMPLE_OPTIONS": "generate.max_new_tokens=6",
            "TRAIN_OPTIONS": "trainer.max_steps=2 trainer.global_batch_size=4 optim.lr=1e-2",
            "GENERATE_OPTIONS": "generate.max_new_tokens=6",
            "EVALUATE_OPTIONS": "evaluate.bootstrap_samples=20",
        }

    def start(self, runs: str, **more: str) -> "subprocess.Popen[str]":
        environment = self.environment | {"RUNS": str(self.folder / runs), **more}
        return subprocess.Popen(
            [self.program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, runs: str, **more: str) -> str:
        """Run the script to its end and return what it printed."""
        process = self.start(runs, **more)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
        return printed


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Return the script after it has run for one round, and again for one more with a limit that holds."""
    found = Script(tmp_path_factory.mktemp("rounds"))
    found.run("whole", ROUNDS="1")
    first = hashes(found.folder / "whole")
    printed = found.run("whole", MAX_KL="1000", MAX_BEYOND="1000")
    assert "stopped: " not in printed
    both = hashes(found.folder / "whole")
    assert {name: both[name] for name in first} == first
    return found


def report(script: Script, runs: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((script.folder / runs / f"evaluate_{number}" / "report.json").read_text())
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all answers, labels and weights, from the manifests."""
    found = {}
    for path in sorted(folder.glob("*/manifest.json")):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        for record in manifest.outputs:
            # Metrics and the state of a training also hold times.
            if record.path.endswith((".jsonl", ".distcp")) and record.path != "metrics.jsonl":
                found[f"{path.parent.name}/{record.path}"] = record.sha256
    return found


def test_every_report_compares_the_rounds_so_far(script: Script) -> None:
    for number in (1, ROUNDS):
        found = report(script, "whole", number)["rounds"]["series"]["dpo"]
        assert list(found["rounds"]) == [str(k) for k in range(number + 1)]
        assert (found["unit"], found["first_labels"]) == ("normalised reward", "label_0")
        assert found["rounds"]["0"]["kl"]["mean"] == 0.0
        assert found["rounds"][str(number)]["kl"]["mean"] != 0.0
    first, second = (
        json.loads((script.folder / "whole" / f"label_{k}" / "reward_stats.json").read_text()) for k in (0, 1)
    )
    assert second["normalised_with"] == {"mean": first["mean"], "std": first["std"]}
    assert second["mean"] != first["mean"]


@pytest.mark.slow
def test_killed_and_repeated_it_gives_the_same_bytes(script: Script) -> None:
    expected = hashes(script.folder / "whole")
    assert {"label_1/labelled.jsonl", "round_2/generations.jsonl"} <= expected.keys()
    assert any(name.startswith("dpo_2/checkpoints/") and name.endswith(".distcp") for name in expected)
    runs = script.folder / "killed"
    for place in ("answers_0/journal", "dpo_1/metrics.jsonl", "label_1"):
        process = script.start("killed")
        while not (runs / place).exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (runs / "evaluate_2").exists()
    script.run("killed")
    assert hashes(runs) == expected
    whole, killed = (report(script, name, ROUNDS)["rounds"]["series"]["dpo"]["rounds"] for name in ("whole", "killed"))
    assert killed == whole


@pytest.mark.parametrize("limit", ["MAX_KL", "MAX_BEYOND"])
def test_a_limit_ends_the_rounds_and_names_the_last_policy_within_it(script: Script, limit: str) -> None:
    printed = script.run("whole", **{limit: "-1000"})
    assert f"above {limit}=-1000; the last policy before is {script.folder / 'sft'}" in printed
    assert f"{script.folder / 'whole' / 'answers_1'}" not in printed
