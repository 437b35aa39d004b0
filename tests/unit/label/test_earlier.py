"""The scale of an earlier labelled set: a chain of runs has the first one's, and one reward model made all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.label.earlier import check_reward_model, read_scale
from offline_align.label.statistics import Scale, fit
from offline_align.lineage.manifest import describe_parent
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import write_label_run


def test_a_chain_of_sets_has_the_scale_of_the_first(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(fit([1.0, 3.0]).as_json()))
    assert read_scale(first) == Scale(2.0, 1.0)
    second.write_text(json.dumps(replace(fit([5.0, 9.0]), normalised_with=read_scale(first)).as_json()))
    assert read_scale(second) == Scale(2.0, 1.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "does not hold the statistics of rewards"),
        ("[1]", "does not hold the statistics of rewards"),
        ('{"mean": 1, "std": 2}', "does not hold the statistics of rewards"),
        (json.dumps(fit([1.0, 3.0]).as_json() | {"normalised_with": {"mean": 1}}), "does not hold the statistics"),
        (json.dumps(fit([2.0, 2.0]).as_json()), "std: 0"),
        (json.dumps(fit([1.0, 3.0]).as_json() | {"std": float("nan")}), "std: nan"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "reward_stats.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said) as found:
        read_scale(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_scale(tmp_path / "reward_stats.json")


def reward_model(folder: Path, weights: str) -> Path:
    """Write the run of a reward model and return its checkpoint."""
    checkpoint = folder / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.json").write_text("{}")
    (checkpoint / "weights").write_text(weights)
    write_manifest(folder, "reward", weights, [], [], [checkpoint], {})
    return checkpoint


def label_run(folder: Path, model: Path | None) -> Path:
    folder.mkdir()
    path = folder / "reward_stats.json"
    path.write_text(json.dumps(fit([1.0, 3.0]).as_json()))
    stage = "prepare" if model is None else "label"
    write_manifest(folder, stage, "l", [], [model] if model else [], [path], {})
    return path


def check(path: Path, model: Path) -> None:
    check_reward_model(path, "runs/label", "runs/reward", [describe_parent(model)])


def test_rewards_of_another_model_are_refused(tmp_path: Path) -> None:
    ours, other = reward_model(tmp_path / "ours", "1"), reward_model(tmp_path / "other", "2")
    path = label_run(tmp_path / "label", ours)
    check(path, ours)
    with pytest.raises(ConfigError, match=r"label.statistics=runs/label: has rewards of another reward model") as found:
        check(path, other)
    assert len(found.value.problems) == 1


def test_scores_of_the_data_are_not_those_of_a_reward_model(tmp_path: Path) -> None:
    path = label_run(tmp_path / "rated", None)
    with pytest.raises(ConfigError, match="scores that `prepare` found"):
        check(path, reward_model(tmp_path / "reward", "1"))


def test_a_converted_model_is_the_same_model(tmp_path: Path) -> None:
    ours = reward_model(tmp_path / "ours", "1")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    write_manifest(theirs, "convert", "c", [], [ours], [theirs / "config.json"], {})
    check(label_run(tmp_path / "label", ours), theirs)
    check(label_run(tmp_path / "label_of_theirs", theirs), ours)


def test_a_file_without_its_run_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "moved.json"
    write_label_run(make(tmp_path / "label"), [1.0, 3.0])
    path.write_bytes((tmp_path / "label" / "reward_stats.json").read_bytes())
    check(path, reward_model(tmp_path / "other", "2"))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
