"""On a GPU: both backends against fp32 on the CPU, each other's checkpoints, and attention between slices.

These have not run yet: no GPU was at hand when they were written. `benchmarks/gpu.sh` runs them first.
"""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HAS_ENGINE = importlib.util.find_spec("transformer_engine_torch") is not None
BACKENDS = ["torch", pytest.param("transformer_engine", marks=pytest.mark.skipif(not HAS_ENGINE, reason="no TE"))]


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_are_those_of_fp32(backend: str, kind: str) -> None:
    """Likelihoods of a policy, and scores of pairs that share their prompts."""
    from benchmarks.gpu import LARGEST_ERROR, SMALLEST_COSINE
    from benchmarks.gpu_ours import _outputs
    from benchmarks.gpu_workload import row_lengths
    from offline_align.config.sections import Device

    lengths = row_lengths(False, 4096, seed=3)
    exact, exact_gradient = _outputs(kind, lengths, Device.cpu, False, "torch")
    found, gradient = _outputs(kind, lengths, Device.cuda, True, backend)
    assert (found - exact).abs().mean() / exact.abs().mean() < LARGEST_ERROR
    assert torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > SMALLEST_COSINE


def test_slices_of_a_row_attend_as_the_row_does() -> None:
    """The causal mask of the kernel must align the last query with the last key, for context parallelism."""
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    q, k, v = (torch.randn(96, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(first: int) -> torch.Tensor:
        queries, keys = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (96 - first, 96))
        out = varlen_attn(q[first:], k, v, queries, keys, 96 - first, 96, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.allclose(attend(0)[40:], attend(40), atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_the_gpu_learns(tmp_path: object, backend: str) -> None:
    from pathlib import Path

    from tests.training import STEPS, TINY, metrics, samples, train, write_jsonl

    folder = Path(str(tmp_path))
    model = [*(w for w in TINY if w != "run.device=cpu"), "run.device=cuda", f"model.backend={backend}"]
    run = train("sft", folder / "run", write_jsonl(folder / "rows.jsonl", samples()), *STEPS, model=model)
    losses = metrics(run)
    assert losses[-1] < losses[0]
