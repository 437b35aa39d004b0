"""Ancestors are found through manifests, even if some of them are missing."""

import json
from pathlib import Path

import pytest

from offline_align.evaluate.ancestry import find_ancestors, find_histograms, read_curves
from tests.runs import write_manifest


def make_run(root: Path, stage: str, inputs: list[Path], parents: list[Path]) -> Path:
    folder = root / stage
    folder.mkdir()
    (folder / "out").write_text(stage)
    write_manifest(folder, stage, stage, inputs, parents, [folder / "out"], {"method": stage})
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Return the manifests of `generate`, whose parents are sft and label; label's parent is sft."""
    sft = make_run(tmp_path, "sft", [], [])
    label = make_run(tmp_path, "label", [], [sft])
    ca = make_run(tmp_path, "ca", [label / "out"], [sft])
    return make_run(tmp_path, "generate", [], [ca])


def test_ancestors_are_found_roots_first(chain: Path) -> None:
    runs = find_ancestors([chain])
    assert [(run.stage, run.depth) for run in runs] == [("sft", 0), ("label", 1), ("ca", 2), ("generate", 3)]
    assert {path.name for path in runs[2].parents} == {"sft", "label"}


def test_a_run_that_is_gone_or_damaged_is_left_out(chain: Path) -> None:
    (chain.parent / "label" / "manifest.json").unlink()
    assert [run.stage for run in find_ancestors([chain])] == ["sft", "ca", "generate"]
    (chain.parent / "sft" / "manifest.json").write_text("{")
    assert [run.stage for run in find_ancestors([chain])] == ["ca", "generate"]


def test_a_folder_without_manifest_has_no_ancestors(tmp_path: Path) -> None:
    assert find_ancestors([tmp_path, tmp_path / "absent"]) == []


def test_curves_survive_torn_and_foreign_lines(chain: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "valid_loss": 1.5},
        {"step": 3, "loss": 1, "accuracy": 0.75},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"step": 4, "lo'
    (chain.parent / "ca" / "metrics.jsonl").write_text(text)
    run = find_ancestors([chain])[2]
    loss, accuracy = read_curves(run)
    assert (loss.name, loss.training, loss.validation) == ("ca: loss", ((1, 2.0), (3, 1.0)), ((2, 1.5),))
    assert (accuracy.name, accuracy.training, accuracy.validation) == ("ca: accuracy", ((3, 0.75),), ())
    assert read_curves(find_ancestors([chain])[0]) == []


def test_histograms_of_label_runs(chain: Path) -> None:
    runs = find_ancestors([chain])
    assert find_histograms(runs) == []
    picture = chain.parent / "label" / "reward_histogram.png"
    picture.write_bytes(b"png")
    (chain.parent / "ca" / "reward_histogram.png").write_bytes(b"png")
    assert find_histograms(runs) == [picture]
