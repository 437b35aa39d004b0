"""Weights loaded into tensor parallel shards give the same logits as transformers with the whole model."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.preloaded import python
from tests.unit.convert.conftest import FAMILIES, SIZES

pytestmark = pytest.mark.distributed
ROWS = [[7, 5, *range(30, 52), 2], [9, 8, 250, 300, 2], [*range(100, 141), 2]]
# The shape of SmolLM2: nine heads in three groups, which divide among three ranks but not among two.
NINE_HEADS = ("Llama", {"hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3})


def save(folder: Path, prefix: str, special: dict[str, Any]) -> Path:
    torch.manual_seed(7)
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | special))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def ours(folders: Sequence[Path], rows: list[list[int]], tp_size: int, scratch: Path) -> list[torch.Tensor]:
    """Return the logits of every folder, computed on `tp_size` tensor parallel ranks."""
    (scratch / "rows.json").write_text(json.dumps(rows))
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_size}"]
    words = ["-m", "tests.distributed.logits", str(scratch / "rows.json"), str(scratch / "out.safetensors")]
    done = subprocess.run(
        [*torchrun, *words, *map(str, folders)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(scratch / "out.safetensors")
    return [found[str(k)] for k in range(len(folders))]


def theirs(folder: Path, rows: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in rows])


def assert_as_exact_as_theirs(found: torch.Tensor, folder: Path) -> None:
    """Compare with float64: our fp32 error is at most twice that of transformers in fp32 on the same machine.

    Ranks and kernels sum in different orders, so the size of either error depends on the machine.
    """
    exact = theirs(folder, ROWS, torch.float64)
    allowed = 2 * (theirs(folder, ROWS, torch.float32) - exact).abs().max()
    assert (found - exact).abs().max() <= allowed, folder.name


def test_every_family_on_two_ranks(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, *spec) for name, spec in FAMILIES.items()]
    for folder, found in zip(folders, ours(folders, ROWS, 2, tmp_path), strict=True):
        assert_as_exact_as_theirs(found, folder)


def test_nine_heads_on_three_ranks(tmp_path: Path) -> None:
    folder = save(tmp_path / "nine", *NINE_HEADS)
    (found,) = ours([folder], ROWS, 3, tmp_path)
    assert_as_exact_as_theirs(found, folder)
