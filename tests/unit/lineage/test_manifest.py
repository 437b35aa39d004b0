"""Writing and reading manifests, and damage to them."""

from pathlib import Path

import pytest

from offline_align.errors import DataError, StorageError
from offline_align.lineage import Status, completed, file_sha256, read_manifest, verify, write_config
from tests.runs import content_key, write_manifest
from tests.unit.lineage.chains import make_run


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


def test_an_input_that_was_edited_after_its_run_is_refused(chain: Path) -> None:
    """It would be recorded as that run's output. After a move out of the folder it counts as new data."""
    rows = chain / "runs/prepare/out.jsonl"
    rows.write_text("edited\n")
    said = rf"{rows}: is not the file that `prepare` wrote into {rows.parent}: run `prepare` again, or move it"
    with pytest.raises(DataError, match=said):
        content_key("sft", {}, [rows], [])
    (chain / "runs/late").mkdir()
    with pytest.raises(DataError, match=said):
        write_manifest(chain / "runs/late", "sft", "k", [rows], [], [], {})
    assert not (chain / "runs/late/manifest.json").exists()
    make_run(chain / "runs/again", "sft", [rows.rename(chain / "data" / "edited.jsonl")], [])
    manifest = read_manifest(chain / "runs/again")
    assert manifest is not None and manifest.parents == []


def test_a_checkpoint_as_parent_keeps_its_name(chain: Path) -> None:
    make_run(chain / "runs/x", "generate", [], [chain / "runs/sft/checkpoints/step_00000001"])
    manifest = read_manifest(chain / "runs/x")
    assert manifest is not None
    assert manifest.parents[0].path == "../sft"
    assert manifest.parents[0].part == "checkpoints/step_00000001"
    assert verify(chain / "runs/x").problems() == []


def test_an_output_outside_the_run_folder_is_an_internal_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("x")
    with pytest.raises(ValueError, match="elsewhere"):
        write_manifest(tmp_path / "run", "sft", "k", [], [], [tmp_path / "elsewhere"], {})


def test_every_flipped_bit_of_a_manifest_is_found(chain: Path) -> None:
    path = chain / "runs/prepare/manifest.json"
    original, manifest = path.read_bytes(), read_manifest(chain / "runs/prepare")
    for position in range(0, len(original), 7):
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            # A flipped bit may change white space, but no value that is read from the file.
            assert read_manifest(chain / "runs/prepare") == manifest
        except StorageError as error:
            assert "manifest.json" in str(error)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_truncated_manifest_is_damaged(chain: Path, length: int) -> None:
    path = chain / "runs/prepare/manifest.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StorageError, match=r"manifest\.json"):
        completed(chain / "runs/prepare", "prepare", "k")
    assert verify(chain / "runs/prepare").status is Status.damaged


def test_a_manifest_of_another_program_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    assert read_manifest(tmp_path) is None


def test_write_config_reads_back(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = {
        "run": {"dir": str(tmp_path)},
        "optim": {"lr": 5e-6},
        "data": {"train": ["a b.jsonl"], "valid": None},
    }
    assert OmegaConf.to_container(OmegaConf.load(write_config(tmp_path, config))) == config
