"""A chain of runs that the tests of this folder verify and damage."""

from pathlib import Path

import pytest

from tests.unit.lineage.chains import make_run


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Make raw.jsonl -> prepare -> sft -> generate in one folder."""
    root = tmp_path / "tree"
    (root / "data").mkdir(parents=True)
    raw = root / "data" / "raw.jsonl"
    raw.write_text('{"prompt": "a"}\n')
    rows = make_run(root / "runs/prepare", "prepare", [raw], [])
    make_run(root / "runs/sft", "sft", [rows], [], "checkpoints/step_00000001/model.safetensors")
    make_run(root / "runs/generate", "generate", [raw], [root / "runs/sft"])
    return root
