"""The chain that the tests of this room look at and spoil."""

from pathlib import Path

import pytest

from tests.unit.lineage.chains import make_run


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
