"""On a GPU: both backends against fp32 on the CPU, attention of slices, and training.

Each test runs in its own process, because other tests patch megatron for the CPU, which lasts for the
rest of their process. `benchmarks/gpu.sh` runs these tests first.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import apart
from offline_align.model.backend import engine_is_installed
from tests.training import STEPS, TINY, metrics, samples, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NO_ENGINE = pytest.mark.skipif(not engine_is_installed(), reason="Transformer Engine is not installed")
BACKENDS = ["torch", pytest.param("transformer_engine", marks=NO_ENGINE)]


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_those_of_fp32(backend: str, kind: str) -> None:
    """Compare likelihoods of a policy, and scores of pairs that share their prompts."""
    from benchmarks.gpu_ours import against_fp32
    from benchmarks.gpu_table import LARGEST_ERROR, SMALLEST_COSINE
    from benchmarks.gpu_workload import row_lengths
    from offline_align.config.sections import Device

    lengths = row_lengths(False, 4096, seed=3)
    error, cosine = apart(against_fp32, backend, kind, lengths, Device.cuda, True)
    assert error < LARGEST_ERROR[kind]
    assert cosine > SMALLEST_COSINE


def largest_difference_of_slices() -> float:
    """Return the largest difference for the queries after the first 40 of a row, computed with and without them."""
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    q, k, v = (torch.randn(96, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(first: int) -> torch.Tensor:
        queries, keys = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (96 - first, 96))
        out = varlen_attn(q[first:], k, v, queries, keys, 96 - first, 96, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out

    return float((attend(0)[40:] - attend(40)).abs().max())


def test_slices_of_a_row_attend_as_the_row_does() -> None:
    """The causal mask of the kernel must align the last query with the last key, for context parallelism."""
    assert apart(largest_difference_of_slices) < 2e-2


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("torch", "bf16"),
        ("torch", "fp32"),
        pytest.param("transformer_engine", "bf16", marks=NO_ENGINE),
        pytest.param("transformer_engine", "fp8", marks=NO_ENGINE),
    ],
)
def test_training_on_the_gpu_learns(tmp_path: Path, backend: str, precision: str) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    model = [*(w for w in TINY if w != "run.device=cpu"), "run.device=cuda", f"model.backend={backend}"]
    words = [f"data.train={write_jsonl(tmp_path / 'rows.jsonl', samples())}", f"trainer.precision={precision}"]
    command = [sys.executable, "-m", "offline_align", "sft", f"run.dir={tmp_path / 'run'}", *words, *model, *STEPS]
    # CUDA libraries do not always print valid UTF-8.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "run")
    assert losses[-1] < losses[0]
