"""PPO's two models at several parallel layouts: the same log-probabilities, values, losses and updates."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.preloaded import python

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2_sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "cp2_tp2_sequence": (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def numbers(folder: Path, ranks: int, layout: dict[str, Any]) -> Any:
    """Return what `tests.distributed.rollout_numbers` writes in this layout."""
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = ["-m", "tests.distributed.rollout_numbers", json.dumps(layout), str(folder / "out.json")]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return numbers(tmp_path_factory.mktemp("alone"), 1, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(tmp_path: Path, alone: Any, name: str) -> None:
    for kind, found in numbers(tmp_path, *LAYOUTS[name]).items():
        expected = alone[kind]
        assert found["count"] == expected["count"] == 46
        assert [len(row) for row in found["before"]] == [3, 1, 9, 12, 2, 14, 5]
        for when in ("before", "after"):
            for row, other in zip(found[when], expected[when], strict=True):
                assert row == pytest.approx(other, abs=2e-4 if when == "after" else 1e-5), (kind, when)
        assert found["step"] == pytest.approx(expected["step"], rel=1e-4, abs=1e-5)
        # The comparison means something: the step has changed the model, and some tokens are clipped.
        changed = [np.abs(np.subtract(a, b)).max() for a, b in zip(found["before"], found["after"], strict=True)]
        assert max(changed) > 1e-3
        assert 0 < found["step"]["clip_fraction"] < 1
