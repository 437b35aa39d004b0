"""Conditions of `ca` from training to answers: stored with the policy, enforced by `generate`, shown by exports."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from tests.training import TINY, labelled, metrics, samples, train, write_jsonl

REWARDS = [round(2 * math.sin(i), 2) for i in range(24)]
QUANTILES = ["method.condition=quantile", "method.quantiles=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conditions")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_jsonl(folder / "labelled.jsonl", labelled(REWARDS))


@pytest.fixture(scope="module")
def policy(folder: Path, data: Path) -> Path:
    """Return a policy that was trained with quantiles and weights."""
    return train("ca", folder / "quantile", data, *QUANTILES, "method.weight_by_reward=true", "method.beta=1")


def stored(run_dir: Path) -> Any:
    return json.loads((run_dir / "checkpoints" / "latest" / "model.json").read_text())["condition"]


def facts(run_dir: Path) -> Any:
    return json.loads((run_dir / "manifest.json").read_text())["extra"]


def generate(policy: Path, run_dir: Path, *words: str) -> int:
    prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in samples(2)]
    path = write_jsonl(run_dir.parent / "prompts.jsonl", prompts)
    common = ["run.device=cpu", "data.max_length=128", "generate.max_new_tokens=4"]
    return run(["generate", f"init.from={policy}", f"data.input={path}", f"run.dir={run_dir}", *common, *words])


def conditions(run_dir: Path) -> list[str]:
    return [json.loads(line)["condition"] for line in (run_dir / "generations.jsonl").read_text().splitlines()]


def test_quantiles_are_stored_with_the_policy(policy: Path) -> None:
    ordered = sorted(REWARDS)
    condition = stored(policy)
    assert condition == facts(policy)["condition"]
    assert condition["cut_points"] == [ordered[5], ordered[11], ordered[17]]
    assert condition["mean_rewards"][3] == pytest.approx(sum(ordered[18:]) / 6)
    assert (condition["kind"], condition["target_quantile"]) == ("quantile", 4)
    assert facts(policy)["data"]["quantile_rows"] == [6, 6, 6, 6]
    assert 1 < facts(policy)["data"]["effective_sample_size"] < 24
    # The loss is weighted, and the other metric is not.
    assert metrics(policy) != metrics(policy, "nll")


def test_generation_asks_for_the_highest_quantile_or_another_one(policy: Path, folder: Path) -> None:
    assert generate(policy, folder / "highest") == 0
    assert conditions(folder / "highest") == ["<rm_score>4"] * 2
    assert generate(policy, folder / "both", "method.target_reward=[1,4]") == 0
    assert conditions(folder / "both") == ["<rm_score>1", "<rm_score>4"] * 2
    assert facts(folder / "both")["targets"] == {"<rm_score>1": 1, "<rm_score>4": 4}
    assert facts(folder / "both")["stored_condition"] == stored(policy)


@pytest.mark.parametrize("target", ["5", "0", "1.5", "-1", "[1,7]"])
def test_other_numbers_are_refused(policy: Path, folder: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(policy, folder / "refused", f"method.target_reward={target}") == 78
    assert "the policy was trained with 4 quantiles of the reward; give the number of one, from 1" in (
        capsys.readouterr().err
    )
    assert not (folder / "refused").exists()


def test_an_export_says_and_asks_for_the_quantile(policy: Path, folder: Path) -> None:
    target = folder / "exported"
    assert run(["convert", f"init.from={policy}", f"run.dir={target}", "run.device=cpu"]) == 0
    card = (target / "README.md").read_text()
    assert "`<rm_score>4`. Write another number there, from 1 (lowest rewards) to 4 (highest)" in card
    assert "| method.condition | quantile |" in card
    assert "<rm_score>4" in json.loads((target / "tokenizer_config.json").read_text())["chat_template"]
    assert generate(target, folder / "from_export", "method.target_reward=2") == 0
    assert conditions(folder / "from_export") == ["<rm_score>2"] * 2
    assert generate(target, folder / "refused", "method.target_reward=9") == 78


def test_the_condition_of_the_paper_is_stored_as_before(data: Path, folder: Path) -> None:
    own = train("ca", folder / "value", data, "method.target_reward=1.5", "trainer.max_steps=1")
    assert list(stored(own).items()) == [
        ("reward_format", "<rm_score>{reward:.1f}"),
        ("reward_limit", 9.9),
        ("target_reward", 1.5),
    ]
    of_rows = {"dropped", "rows", "bad_rows", "sources", "reward_scale"}
    assert facts(own)["data"].keys() == {"reward_min", "reward_max", *of_rows}


def test_validation_rows_lie_in_the_quantiles_of_the_training_rows(data: Path, folder: Path) -> None:
    losses = []
    # All of these rewards lie in the highest quantile of the training rows.
    for name, rewards in (("different", [5.0, 6.0, 7.0, 8.0]), ("equal", [8.0] * 4)):
        valid = write_jsonl(folder / f"{name}.jsonl", labelled(rewards))
        words = [*QUANTILES, "method.weight_by_reward=true", f"data.valid={valid}", "trainer.max_steps=1"]
        losses.append(metrics(train("ca", folder / name, data, *words), "valid_loss"))
    assert losses[0] == losses[1]


def test_a_continued_run_draws_the_same_bounds(data: Path, folder: Path) -> None:
    words = ["method.condition=at_least", "method.bounds=2", "method.weight_by_reward=true", f"data.valid={data}"]
    words += ["trainer.save_interval=2", "trainer.keep_checkpoints=9", "method.target_reward=1.0"]
    whole = train("ca", folder / "whole", data, *words)
    assert stored(whole)["kind"] == "at_least"
    assert facts(whole)["data"]["rows"] == 48
    own = folder / "continued"
    shutil.copytree(whole, own, symlinks=True)
    (own / "manifest.json").unlink()
    shutil.rmtree(own / "checkpoints" / "step_00000005")
    shutil.rmtree(own / "cache")
    train("ca", own, data, *words)
    assert metrics(own) == metrics(whole)
    assert metrics(own, "valid_loss") == metrics(whole, "valid_loss")


def test_settings_that_contradict_each_other_are_named(data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["ca", f"run.dir={tmp_path / 'x'}", f"data.train={data}", *TINY]
    for given, complaint in (
        (["method.quantiles=1", QUANTILES[0]], "method.quantiles=1: must be 2 or more"),
        ([*QUANTILES, "method.target_reward=5"], "from 1 (lowest rewards) to method.quantiles=4 (highest)"),
        (["method.quantiles=7"], "has an effect only with method.condition=quantile; leave it unset"),
        (["method.bounds=2"], "has an effect only with method.condition=at_least; leave it unset"),
        (["method.bounds=0", "method.condition=at_least"], "method.bounds=0: must be 1 or more"),
        (["method.beta=1"], "has an effect only with method.weight_by_reward=true; leave it unset"),
        (["method.beta=0", "method.weight_by_reward=true"], "method.beta=0.0: must be a finite number above 0"),
        ([QUANTILES[0], "method.quantile_format=x"], "method.quantile_format='x': needs the field {quantile} once"),
        (["method.condition=rank"], "method.condition=rank"),
    ):
        assert run([*words, *given]) == 78, given
        assert complaint in capsys.readouterr().err, given
    assert not (tmp_path / "x").exists()


def test_a_dry_run_of_a_sample_shows_the_quantile_among_all_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first row is the 26th of 40, but the highest one of those that are read.
    path = write_jsonl(folder / "many.jsonl", labelled([25.5, *(float(i) for i in range(1, 40))]))
    words = ["ca", f"run.dir={tmp_path / 'x'}", f"data.train={path}", *TINY, *QUANTILES, "dry_run=true"]
    assert run([*words, "data.dry_run_rows=2"]) == 0
    shown = capsys.readouterr().out
    assert "<rm_score>3" in shown
    assert not (tmp_path / "x").exists()
