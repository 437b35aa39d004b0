"""Composition: defaults, groups, and every mistake reported at once."""

from pathlib import Path

import pytest

from offline_align.config import compose as compose_module
from offline_align.config.compose import configs_dir, require, to_mapping
from offline_align.config.reference import schema_keys, stage_groups
from offline_align.config.runs import LabelRun, RewardRun, TrainRun
from offline_align.config.sections import Device, ModelSection
from offline_align.errors import ConfigError
from offline_align.lineage import flat
from offline_align.stages.registry import STAGES
from tests.runs import compose


def composed(stage: str, *words: str) -> TrainRun:
    config = require(compose(stage, ["run.dir=x", *words]), [])
    assert isinstance(config, TrainRun)
    return config


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes_with_its_defaults(stage: str) -> None:
    assert compose(stage, ["run.dir=x"]).problems == []


def test_defaults_are_the_papers() -> None:
    sft, reward = composed("sft"), composed("reward")
    assert (sft.optim.lr, sft.trainer.global_batch_size, sft.data.max_length) == (5e-6, 128, 4096)
    assert isinstance(reward, RewardRun)
    assert (reward.optim.lr, reward.trainer.max_epochs) == (9e-6, 1)
    assert composed("rwr").method.beta == 5.0  # type: ignore[attr-defined]
    assert composed("fa").method.threshold == 0.0  # type: ignore[attr-defined]
    assert composed("ca").method.target_reward == 5.0  # type: ignore[attr-defined]
    assert sft.model.num_layers == 32 and sft.model.vocab_size == 256000


def test_words_win_over_file_and_file_over_groups(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1.0e-4, min_lr: 1.0e-6}\ntrainer: {max_steps: 3}\n")
    config = composed("sft", f"--config={file}", "optim.lr=2e-4")
    assert (config.optim.lr, config.optim.min_lr, config.trainer.max_steps) == (2e-4, 1e-6, 3)


def test_a_written_configuration_can_be_read_again(tmp_path: Path) -> None:
    import yaml

    first = compose("ca", ["run.dir=x", "model=demo", "init.from=a", "data.train=[a,b]", "+model.overrides.fp8=null"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_mapping(first.config)))
    again = compose("ca", ["--config", str(file)])
    assert again.problems == []
    assert to_mapping(again.config) == to_mapping(first.config)


def test_own_groups_are_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "num_layers: 2\nhidden_size: 8\nffn_hidden_size: 16\nnum_attention_heads: 2\n"
    )
    assert composed("sft", "--config-dir", str(tmp_path), "model=mine").model.hidden_size == 8


def test_a_group_without_a_choice_in_the_package_takes_own_choices(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "short.yaml").write_text("max_length: 77\n")
    assert composed("ca", "--config-dir", str(tmp_path), "data=short").data.max_length == 77
    (problem,) = compose("verify", ["run.dir=x", "--config-dir", str(tmp_path), "data=short"]).problems
    assert "has no group data" in problem


def test_all_mistakes_are_reported_together() -> None:
    words = [
        "optim.lr=fast",
        "trainer.max_stepz=3",
        "parallel=tp9",
        "parallel.sequence_parallel=3",
        "model.num_layers=1.5",
    ]
    problems = compose("sft", words).problems
    assert len(problems) == 6  # run.dir is missing too
    text = "\n".join(problems)
    for expected in (
        "optim.lr=fast: expected a number",
        "trainer.max_stepz=3: unknown key; did you mean trainer.max_steps?",
        "parallel=tp9: no such choice; did you mean tp4?",
        "parallel.sequence_parallel=3: expected true or false",
        "model.num_layers=1.5: expected a whole number",
        "run.dir is not set",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("optim.lr=null", "null is not allowed"),
        ("run.device=tpu", "expected one of [auto, cpu, cuda]"),
        ("lr=1", "did you mean optim.lr?"),
        ("~optim.lr", "only key=value can be used here"),
        ("optim.lr=1,2", "only key=value can be used here"),
        ("method.beta=1", "unknown key"),
        ("judge=openai", "has no group judge"),
        ("data.train=[a", "cannot be read"),
        ("--config=nowhere.yaml", "no such path"),
        ("generate.n=2", "unknown key"),
    ],
)
def test_each_mistake_names_key_and_fix(word: str, reason: str) -> None:
    (problem,) = compose("sft", ["run.dir=x", word]).problems
    assert word.split("=")[0].lstrip("~") in problem
    assert reason in problem


@pytest.mark.parametrize("word", ["run.dir=", "run.dir= ", 'run.dir=""', "run.dir=' '"])
@pytest.mark.parametrize("stage", ["sft", "plan"])
def test_an_empty_run_dir_is_not_the_current_folder(stage: str, word: str) -> None:
    (problem,) = compose(stage, [word]).problems
    assert problem.startswith("run.dir is not set")


HOME = [
    ("sft", "run.dir=~/a", "run.dir", "/home/u/a"),
    ("sft", 'run.dir="~/a"', "run.dir", "/home/u/a"),
    ("sft", "run.dir=~", "run.dir", "/home/u"),
    ("sft", "init.from=~/runs/sft", "init.from", "/home/u/runs/sft"),
    ("sft", "data.train=~/u/sft.jsonl", "data.train", "/home/u/u/sft.jsonl"),
    ("sft", 'data.valid=["~/a","b~/c"]', "data.valid", ["/home/u/a", "b~/c"]),
    ("sft", "model.tokenizer=~/t.model", "model.tokenizer", "/home/u/t.model"),
    ("evaluate", "judge.model=~/rm", "judge.model", "/home/u/rm"),
    ("evaluate", "judge.second_model=~/rm", "judge.second_model", "/home/u/rm"),
    ("evaluate", "evaluate.runs=['~/a','~/b']", "evaluate.runs", ["/home/u/a", "/home/u/b"]),
    ("prepare", "data.input=~/raw.jsonl", "data.input", "/home/u/raw.jsonl"),
]


@pytest.mark.parametrize(("stage", "word", "key", "path"), HOME)
def test_home_is_expanded_in_every_path(
    stage: str, word: str, key: str, path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    found = compose(stage, ["run.dir=x", word])
    assert found.problems == []
    assert flat(to_mapping(found.config))[key] == path


def test_home_is_expanded_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run: {dir: ~/a}\ndata: {train: [~/b]}\n")
    config = require(compose("sft", ["--config=~/mine.yaml"]), [])
    assert isinstance(config, TrainRun)
    assert (config.run.dir, config.data.train) == (f"{tmp_path}/a", [f"{tmp_path}/b"])


def test_home_is_expanded_in_all_keys_for_paths() -> None:
    """A new key of the type "path or list" must be in `_PATHS`, or in the exception here."""
    keys = {key.name for stage in STAGES.values() for key in schema_keys(stage.schema) if key.kind == "path or list"}
    assert keys - {"method.target_reward"} <= compose_module._PATHS


@pytest.mark.parametrize("value", ["runs/a=b", "runs/lr=1e-5 seed=2", "runs/é", "runs/it's", "runs/a#1", "a(1)"])
def test_a_value_that_the_grammar_rejects_is_a_string(value: str) -> None:
    assert composed("sft", f"run.dir={value}").run.dir == value


@pytest.mark.parametrize("word", ["data.train=[~/a,~/b]", "data.train=a,b", "data.train=~/a,~/b", 'data.train="a'])
def test_a_key_that_cannot_be_parsed_is_not_reported_as_unset(word: str) -> None:
    found = compose("sft", ["run.dir=x", word])
    with pytest.raises(ConfigError) as caught:
        require(found, ["data.train is not set: give the file", "init.from is not set: give weights"])
    (first, second) = caught.value.problems
    assert first.startswith(f"{word}: ")
    assert second.startswith("init.from is not set")


@pytest.mark.parametrize("key", ["max_length", "too_long", "template", "cache_dir"])
def test_prepare_has_no_keys_without_effect(key: str) -> None:
    (problem,) = compose("prepare", ["run.dir=x", f"data.{key}=1"]).problems
    assert f"data.{key}=1: unknown key" in problem


def test_problems_are_one_configuration_error() -> None:
    with pytest.raises(ConfigError) as caught:
        require(compose("sft", ["optim.lr=x"]), ["more"])
    assert caught.value.exit_code == 78
    assert len(caught.value.problems) == 3


def test_sections_are_frozen_and_typed() -> None:
    config = composed("sft", "run.device=cpu")
    assert config.run.device is Device.cpu
    with pytest.raises(AttributeError):
        config.run.dir = "y"  # type: ignore[misc]


def test_yaml_holds_differences_only() -> None:
    """A default is defined once: no model group repeats a default of the schema."""
    import yaml

    for path in configs_dir().glob("model/*.yaml"):
        for name, value in yaml.safe_load(path.read_text()).items():
            assert getattr(ModelSection, name, "must be set") != value, f"{path.name}: {name}"


def test_label_has_no_optimizer() -> None:
    config = compose("label", ["run.dir=x", "optim.lr=1"])
    assert isinstance(config.config, LabelRun)
    assert any("unknown key" in p for p in config.problems)


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_documented(stage: str) -> None:
    assert all(key.text for key in schema_keys(STAGES[stage].schema))


def test_groups_of_a_stage_are_listed() -> None:
    assert set(stage_groups("fa")) == {"model", "parallel", "trainer", "optim", "launcher"}
    assert "tp4" in stage_groups("fa")["parallel"]


def test_the_group_for_a_small_machine_serves_every_stage_that_runs_a_model() -> None:
    """Each stage takes the keys that it has, and the learning rate of the group wins over that of `reward`."""
    for stage in ("sft", "reward", "label", "fa", "rwr", "ca", "generate", "evaluate"):
        found = compose(stage, ["run.dir=x", "trainer=cpu"])
        assert found.problems == []
        assert found.config.run.device is Device.cpu
        assert found.config.data.max_length == 512  # type: ignore[attr-defined]
    reward, label = composed("reward", "trainer=cpu"), compose("label", ["run.dir=x", "trainer=cpu"]).config
    assert (reward.trainer.max_steps, reward.optim.lr) == (20, 2e-5)
    assert composed("reward", "trainer=cpu", "optim.lr=1e-5").optim.lr == 1e-5
    assert isinstance(label, LabelRun) and label.trainer.micro_batch_size == 2
    for stage in ("prepare", "convert", "plan", "verify"):
        assert "has no group trainer" in compose(stage, ["run.dir=x", "trainer=cpu"]).problems[0]


def test_a_mistake_in_an_own_group_is_not_taken_for_a_key_of_another_stage(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("micro_batch: 2\n")
    (problem,) = compose("label", ["run.dir=x", "--config-dir", str(tmp_path), "trainer=mine"]).problems
    assert "trainer.micro_batch=2" in problem and "unknown key" in problem


def test_every_key_of_the_packages_groups_exists_in_some_stage() -> None:
    known = {key.name for stage in STAGES.values() for key in schema_keys(stage.schema)}
    for path in configs_dir().glob("*/*.yaml"):
        if path.parent.name != "stage":
            choice = f"{path.parent.name}={path.stem}"
            assert compose_module._keys_of_choices([choice]) <= known | {"init.from_"}, choice
