"""Content keys, and the finished runs that they identify."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.compose import to_mapping
from offline_align.errors import ConfigError
from offline_align.lineage import completed, read_manifest
from offline_align.stages.registry import STAGES
from tests.runs import content_key, write_manifest
from tests.unit.lineage.chains import CONFIG


def key_with(tmp_path: Path, key: str, value: Any) -> str:
    section, _, name = key.partition(".")
    config = json.loads(json.dumps(CONFIG))
    if name:
        config.setdefault(section, {})[name] = value
    else:
        config[section] = value
    return content_key("sft", config, [], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.dir", "runs/b"),
        ("run.device", "cuda"),
        ("dry_run", True),
        ("debug", True),
        ("launcher.nodes", 4),
        ("parallel.tensor_model_parallel_size", 2),
        ("trainer.max_time", "1h"),
    ],
)
def test_key_ignores_settings_that_do_not_change_results(tmp_path: Path, key: str, value: Any) -> None:
    assert key_with(tmp_path, key, value) == content_key("sft", CONFIG, [], [])


@pytest.mark.parametrize(
    ("key", "as_before", "value"),
    [
        ("data.template_date", None, "2026-01-31"),
        ("data.sample", None, 5),
        ("data.sample_by", "source", "row"),
        ("data.source_column", "source", None),
        ("data.weights", {}, {"hh": 1}),
    ],
)
def test_new_settings_leave_earlier_keys_as_they_are(tmp_path: Path, key: str, as_before: Any, value: Any) -> None:
    assert key_with(tmp_path, key, as_before) == content_key("sft", CONFIG, [], [])
    assert key_with(tmp_path, key, value) != content_key("sft", CONFIG, [], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("run.seed", 2), ("optim.lr", 2e-5), ("trainer.max_steps", 5), ("method.beta", 1.0)],
)
def test_key_depends_on_settings_that_change_results(tmp_path: Path, key: str, value: Any) -> None:
    assert key_with(tmp_path, key, value) != content_key("sft", CONFIG, [], [])


def test_later_settings_of_conditional_alignment_keep_the_keys_of_earlier_versions() -> None:
    words = ["run.dir=x", "data.train=labelled.jsonl"]
    now = to_mapping(STAGES["ca"].compose(words).config)
    later = {"condition", "quantiles", "quantile_format", "bounds", "weight_by_reward", "beta"}
    before = now | {"method": {name: value for name, value in now["method"].items() if name not in later}}
    assert before["method"] == {"target_reward": 5.0, "reward_format": "<rm_score>{reward:.1f}", "reward_limit": 9.9}
    assert content_key("ca", now, [], []) == content_key("ca", before, [], [])
    changed = ["method.condition=quantile", "method.weight_by_reward=true", "method.condition=at_least"]
    keys = {content_key("ca", to_mapping(STAGES["ca"].compose([*words, word]).config), [], []) for word in changed}
    assert len(keys - {content_key("ca", before, [], [])}) == 3


def test_the_temperature_of_rwr_stays_in_its_key() -> None:
    config = to_mapping(STAGES["rwr"].compose(["run.dir=x", "data.train=labelled.jsonl"]).config)
    assert content_key("rwr", config, [], []) != content_key("rwr", config | {"method": {}}, [], [])


def test_key_depends_on_the_stage() -> None:
    assert content_key("sft", CONFIG, [], []) != content_key("fa", CONFIG, [], [])


def test_key_does_not_depend_on_the_order_of_settings() -> None:
    turned = dict(reversed(CONFIG.items()))
    assert content_key("sft", turned, [], []) == content_key("sft", CONFIG, [], [])


def test_key_depends_on_the_content_of_inputs_not_on_names(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("a")
    two.write_text("a")

    def key(path: Path) -> str:
        return content_key("sft", CONFIG | {"data": {"train": [str(path)]}}, [path], [])

    assert key(one) == key(two)
    two.write_text("b")
    assert key(one) != key(two)


def test_key_tells_training_from_validation_data(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text("a")
    two.write_text("b")
    data, swapped = {"train": str(one), "valid": str(two)}, {"train": str(two), "valid": str(one)}
    keys = {content_key("sft", {"data": d}, [one, two], []) for d in (data, swapped)}
    assert len(keys) == 2


def test_key_depends_on_the_content_of_the_parent(chain: Path) -> None:
    config = CONFIG | {"init": {"from": str(chain / "runs/sft")}}
    before = content_key("ca", config, [], [chain / "runs/sft"])
    manifest = read_manifest(chain / "runs/sft")
    assert manifest is not None
    output = chain / "runs/sft/checkpoints/step_00000001/model.safetensors"
    output.write_text("other weights")
    write_manifest(chain / "runs/sft", "sft", manifest.key, [], [], [output], {})
    assert content_key("ca", config, [], [chain / "runs/sft"]) != before


def test_key_is_the_same_before_and_after_the_parent_has_finished(chain: Path) -> None:
    policy = chain / "runs/sft/checkpoints/step_00000001"
    (policy / "model.json").write_text("{}")
    (chain / "runs/sft/manifest.json").unlink()
    before = content_key("ca", {}, [], [policy])
    write_manifest(chain / "runs/sft", "sft", "key", [], [], [chain / "runs/sft/checkpoints"], {})
    assert content_key("ca", {}, [], [policy]) == before


def test_key_tells_two_checkpoints_of_a_run_apart(chain: Path) -> None:
    run_dir = chain / "runs/sft"
    named = run_dir / "checkpoints/step_00000001"
    assert content_key("ca", {}, [], [run_dir]) != content_key("ca", {}, [], [named])


def test_key_survives_a_move_of_the_whole_tree(chain: Path, tmp_path: Path) -> None:
    def key(root: Path) -> str:
        rows, policy = root / "data/raw.jsonl", root / "runs/sft"
        config = {"data": {"input": str(rows)}, "init": {"from": str(policy)}}
        return content_key("generate", config, [rows], [policy])

    before = key(chain)
    assert key(Path(shutil.move(chain, tmp_path / "moved"))) == before


def test_completed_is_false_without_a_manifest(tmp_path: Path) -> None:
    assert not completed(tmp_path / "new", "sft", "k")


def test_completed_is_true_for_the_same_key(chain: Path) -> None:
    key = content_key("prepare", CONFIG, [chain / "data/raw.jsonl"], [])
    assert completed(chain / "runs/prepare", "prepare", key)


def test_completed_refuses_another_stage_and_another_key(chain: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir=.*finished run of `prepare`"):
        completed(chain / "runs/prepare", "label", "k")
    with pytest.raises(ConfigError, match=r"run\.dir=.*other settings or inputs"):
        completed(chain / "runs/prepare", "prepare", "k")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_completed_is_false_if_an_output_is_incomplete(chain: Path, damage: str) -> None:
    output = chain / "runs/prepare/out.jsonl"
    if damage == "cut":
        output.write_text("p")
    else:
        output.unlink()
    key = content_key("prepare", CONFIG, [chain / "data/raw.jsonl"], [])
    assert not completed(chain / "runs/prepare", "prepare", key)


def test_a_folder_without_a_model_cannot_be_a_parent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a finished run"):
        content_key("sft", CONFIG, [], [tmp_path])
