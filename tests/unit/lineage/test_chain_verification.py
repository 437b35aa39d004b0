"""Verification of a run and of the chain of its parents."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offline_align.lineage import (
    Status,
    Verification,
    file_sha256,
    verify,
)
from tests.unit.lineage.chains import make_run


def stages(report: Verification) -> list[str]:
    return [report.stage] + [stage for parent in report.parents for stage in stages(parent)]


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


def test_verify_finds_a_parent_that_was_replaced(chain: Path) -> None:
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


def reseal(run_dir: Path, change: dict[str, Any]) -> None:
    """Forge a manifest: change entries and seal it with a valid hash."""
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


def test_verify_ends_if_runs_name_each_other_as_parents(chain: Path) -> None:
    link = {"path": "../sft", "stage": "sft", "manifest_sha256": "0" * 64, "content_sha256": "0" * 64}
    reseal(chain / "runs/prepare", {"parents": [link]})
    assert verify(chain / "runs/sft").problems()


def test_a_manifest_with_malformed_entries_is_damaged(chain: Path) -> None:
    reseal(chain / "runs/prepare", {"outputs": [{"file": "x"}]})
    assert verify(chain / "runs/prepare").status is Status.damaged
