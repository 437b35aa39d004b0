"""Two tensor parallel ranks hand over whole weights, and both get all answers of a rollout."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_logits import save
from tests.preloaded import python
from tests.unit.convert.conftest import FAMILIES

pytestmark = pytest.mark.distributed
ROWS = 30


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("folders")
    return [save(folder / name, *FAMILIES[name]) for name in ("llama3", "qwen2_tied", "qwen3")]


@pytest.fixture(scope="module")
def output(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ranks") / "out.safetensors"
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "tests.distributed.rollouts", str(target), str(ROWS), *map(str, folders)]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def test_gathered_weights_are_those_of_the_folder(folders: list[Path], output: Path) -> None:
    """Equal tensors give equal logits, so no forward pass is needed to compare."""
    found = load_file(output)
    expected = {
        f"{k}:{name}": tensor
        for k, folder in enumerate(folders)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_ranks_share_a_rollout_and_get_all_of_it(output: Path) -> None:
    first, second = (json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2))
    assert first["answers"] == second["answers"]
    assert [int(answer.split()[0]) for answer in first["answers"]] == list(range(ROWS))
    assert {answer.split()[-1] for answer in first["answers"]} == {"0", "1"}
    assert first["computed"] + second["computed"] == ROWS
    assert abs(first["computed"] - second["computed"]) <= 4
