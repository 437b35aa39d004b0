"""Manifests, content keys and verification."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offline_align.errors import ConfigError, StorageError
from offline_align.lineage import (
    Report,
    Status,
    completed,
    content_key,
    file_sha256,
    read_manifest,
    verify,
    write_atomically,
    write_config,
    write_manifest,
)

CONFIG = {"run": {"dir": "runs/a", "seed": 1}, "optim": {"lr": 1e-5}, "launcher": {"nodes": 1}}


def make_run(run_dir: Path, stage: str, inputs: list[Path], parents: list[Path], name: str = "out.jsonl") -> Path:
    run_dir.mkdir(parents=True)
    output = run_dir / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f"{stage}\n")
    write_config(run_dir, CONFIG)
    key = content_key(stage, CONFIG, inputs, parents)
    write_manifest(run_dir, stage, key, inputs, parents, [output], {"method": stage})
    return output


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """raw.jsonl -> prepare -> sft -> generate, all under one folder."""
    root = tmp_path / "tree"
    (root / "data").mkdir(parents=True)
    raw = root / "data" / "raw.jsonl"
    raw.write_text('{"prompt": "a"}\n')
    rows = make_run(root / "runs/prepare", "prepare", [raw], [])
    make_run(root / "runs/sft", "sft", [rows], [], "checkpoints/step_00000001/model.safetensors")
    make_run(root / "runs/generate", "generate", [raw], [root / "runs/sft"])
    return root


def stages(report: Report) -> list[str]:
    return [report.stage] + [stage for parent in report.parents for stage in stages(parent)]


def test_file_sha256_is_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_file_sha256_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone.*No such file"):
        file_sha256(tmp_path / "gone")


def test_manifest_records_the_run(chain: Path) -> None:
    manifest = read_manifest(chain / "runs/generate")
    assert manifest is not None
    assert manifest.stage == "generate"
    assert manifest.extra == {"method": "generate"}
    assert [r.path for r in manifest.inputs] == ["../../data/raw.jsonl"]
    assert [(p.path, p.stage) for p in manifest.parents] == [("../sft", "sft")]
    assert [r.path for r in manifest.outputs] == ["config.yaml", "out.jsonl"]
    assert manifest.outputs[1].bytes == len("generate\n")
    assert manifest.outputs[1].sha256 == file_sha256(chain / "runs/generate/out.jsonl")
    assert {"python", "torch", "megatron-core", "offline-align"} <= manifest.versions.keys()


def test_the_run_that_wrote_an_input_becomes_a_parent(chain: Path) -> None:
    manifest = read_manifest(chain / "runs/sft")
    assert manifest is not None
    assert [(p.path, p.stage) for p in manifest.parents] == [("../prepare", "prepare")]


def test_a_parent_named_twice_is_recorded_once(chain: Path) -> None:
    rows, prepare = chain / "runs/prepare/out.jsonl", chain / "runs/prepare"
    make_run(chain / "runs/again", "sft", [rows], [prepare, prepare])
    manifest = read_manifest(chain / "runs/again")
    assert manifest is not None
    assert len(manifest.parents) == 1


def test_a_checkpoint_as_parent_keeps_its_name(chain: Path) -> None:
    make_run(chain / "runs/x", "generate", [], [chain / "runs/sft/checkpoints/step_00000001"])
    manifest = read_manifest(chain / "runs/x")
    assert manifest is not None
    assert manifest.parents[0].path == "../sft"
    assert manifest.parents[0].part == "checkpoints/step_00000001"
    assert verify(chain / "runs/x").problems() == []


def test_a_folder_that_is_no_model_is_no_parent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a finished run"):
        content_key("sft", CONFIG, [], [tmp_path])


def test_output_outside_the_run_folder_is_our_bug(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(ValueError, match="elsewhere"):
        write_manifest(tmp_path / "run", "sft", "k", [], [], [tmp_path / "elsewhere"], {})


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
        ("data.num_workers", 7),
    ],
)
def test_key_ignores_where_and_how_fast(tmp_path: Path, key: str, value: Any) -> None:
    assert key_with(tmp_path, key, value) == content_key("sft", CONFIG, [], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("run.seed", 2), ("optim.lr", 2e-5), ("trainer.max_steps", 5), ("method.beta", 1.0)],
)
def test_key_depends_on_what_is_computed(tmp_path: Path, key: str, value: Any) -> None:
    assert key_with(tmp_path, key, value) != content_key("sft", CONFIG, [], [])


def test_key_depends_on_the_stage() -> None:
    assert content_key("sft", CONFIG, [], []) != content_key("fa", CONFIG, [], [])


def test_key_does_not_depend_on_the_order_of_settings() -> None:
    turned = dict(reversed(CONFIG.items()))
    assert content_key("sft", turned, [], []) == content_key("sft", CONFIG, [], [])


def test_key_follows_content_not_names(tmp_path: Path) -> None:
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


def test_key_follows_the_parent(chain: Path) -> None:
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
def test_completed_is_false_where_an_output_is_not_whole(chain: Path, damage: str) -> None:
    output = chain / "runs/prepare/out.jsonl"
    if damage == "cut":
        output.write_text("p")
    else:
        output.unlink()
    key = content_key("prepare", CONFIG, [chain / "data/raw.jsonl"], [])
    assert not completed(chain / "runs/prepare", "prepare", key)


def test_verify_walks_back_to_the_first_data_file(chain: Path) -> None:
    report = verify(chain / "runs/generate")
    assert stages(report) == ["generate", "sft", "prepare"]
    assert report.problems() == []
    prepare = report.parents[0].parents[0]
    assert [(c.path, c.status) for c in prepare.inputs] == [("../../data/raw.jsonl", Status.whole)]


def test_verify_survives_a_move_of_the_whole_tree(chain: Path, tmp_path: Path) -> None:
    moved = shutil.move(chain, tmp_path / "moved")
    assert verify(Path(moved) / "runs/generate").problems() == []


def test_verify_finds_a_flipped_bit_in_any_output_of_the_chain(chain: Path) -> None:
    output = chain / "runs/sft/checkpoints/step_00000001/model.safetensors"
    content = bytearray(output.read_bytes())
    content[0] ^= 1
    output.write_bytes(content)
    report = verify(chain / "runs/generate")
    assert report.status is Status.whole
    assert report.parents[0].status is Status.damaged
    [problem] = report.problems()
    assert "model.safetensors: damaged: other content" in problem


@pytest.mark.parametrize(("name", "status"), [("runs/sft/config.yaml", "missing"), ("data/raw.jsonl", "missing")])
def test_verify_finds_missing_files(chain: Path, name: str, status: str) -> None:
    (chain / name).unlink()
    problems = verify(chain / "runs/generate").problems()
    assert problems
    assert all(f"{Path(name).name}: {status}" in p for p in problems)


def test_verify_finds_changed_inputs(chain: Path) -> None:
    (chain / "data/raw.jsonl").write_text('{"prompt": "b"}\n')
    report = verify(chain / "runs/prepare")
    assert report.status is Status.changed
    assert "changed: other content" in report.problems()[0]


def test_verify_finds_a_parent_that_was_made_again(chain: Path) -> None:
    shutil.rmtree(chain / "runs/prepare")
    raw = chain / "data/raw.jsonl"
    raw.write_text("new\n")
    make_run(chain / "runs/prepare", "prepare", [raw], [])
    parent = verify(chain / "runs/sft").parents[0]
    assert parent.status is Status.changed


def test_verify_finds_a_missing_parent(chain: Path) -> None:
    shutil.rmtree(chain / "runs/prepare")
    assert verify(chain / "runs/sft").parents[0].status is Status.missing


def test_verify_of_an_unfinished_run(tmp_path: Path) -> None:
    assert "has not finished" in verify(tmp_path).problems()[0]


def test_verify_checks_a_bare_folder_of_weights(tmp_path: Path) -> None:
    weights = tmp_path / "llama"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_text("w")
    make_run(tmp_path / "runs/sft", "sft", [], [weights])
    [parent] = verify(tmp_path / "runs/sft").parents
    assert (parent.stage, parent.status) == ("huggingface", Status.whole)
    (weights / "model.safetensors").write_text("v")
    assert verify(tmp_path / "runs/sft").parents[0].status is Status.changed


def test_every_flipped_bit_of_a_manifest_is_found(chain: Path) -> None:
    path = chain / "runs/prepare/manifest.json"
    original, manifest = path.read_bytes(), read_manifest(chain / "runs/prepare")
    for position in range(0, len(original), 7):
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            # White space may change; nothing that is read from the file may.
            assert read_manifest(chain / "runs/prepare") == manifest
        except StorageError as error:
            assert "manifest.json" in str(error)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_truncated_manifest_is_damage(chain: Path, length: int) -> None:
    path = chain / "runs/prepare/manifest.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StorageError, match=r"manifest\.json"):
        completed(chain / "runs/prepare", "prepare", "k")
    assert verify(chain / "runs/prepare").status is Status.damaged


def test_manifest_of_another_program_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    assert read_manifest(tmp_path) is None


def reseal(run_dir: Path, change: dict[str, Any]) -> None:
    """Write a manifest that is whole but lies."""
    from offline_align.lineage.files import canonical_json, text_sha256

    raw = json.loads((run_dir / "manifest.json").read_text()) | change
    del raw["sha256"]
    raw["sha256"] = text_sha256(canonical_json(raw))
    (run_dir / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("name", ["../../data/raw.jsonl", "link.jsonl", "ABSOLUTE"])
def test_outputs_outside_the_run_folder_are_not_read(chain: Path, name: str) -> None:
    raw, run_dir = chain / "data/raw.jsonl", chain / "runs/prepare"
    (run_dir / "link.jsonl").symlink_to(raw)
    name = str(raw) if name == "ABSOLUTE" else name
    reseal(run_dir, {"outputs": [{"path": name, "sha256": file_sha256(raw), "bytes": raw.stat().st_size}]})
    [check] = verify(run_dir).outputs
    assert check.status is Status.damaged
    assert "outside the run folder" in check.reason


def test_runs_that_name_each_other_come_to_an_end(chain: Path) -> None:
    link = {"path": "../sft", "stage": "sft", "manifest_sha256": "0" * 64, "content_sha256": "0" * 64}
    reseal(chain / "runs/prepare", {"parents": [link]})
    assert verify(chain / "runs/sft").problems()


def test_malformed_entries_are_damage(chain: Path) -> None:
    reseal(chain / "runs/prepare", {"outputs": [{"file": "x"}]})
    assert verify(chain / "runs/prepare").status is Status.damaged


def test_write_atomically_keeps_the_old_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_config_reads_back(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = {
        "run": {"dir": str(tmp_path)},
        "optim": {"lr": 5e-6},
        "data": {"train": ["a b.jsonl"], "valid": None},
    }
    assert OmegaConf.to_container(OmegaConf.load(write_config(tmp_path, config))) == config
