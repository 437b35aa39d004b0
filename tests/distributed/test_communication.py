"""Bytes that ranks send in a step, counted at the collectives, compared with the formulas of the cost model."""

import json
import subprocess
import sys

import pytest

from benchmarks.communication import FFN, HEADS, HIDDEN, LAYERS, VOCABULARY
from offline_align.config.sections import ModelSection, ParallelSection
from offline_align.estimate.sizes import ParallelSizes, model_sizes
from offline_align.estimate.step_time import data_bytes

pytestmark = pytest.mark.distributed

# Logged metrics and the gradient norm: a few numbers a step.
BOOKKEEPING_BYTES = 200
FP32 = 4


def counted(layout: str) -> dict[str, float]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "benchmarks.communication", layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return found


def test_data_parallel_ranks_send_gradients_once_and_weights_once() -> None:
    found = counted("dp")
    model = ModelSection(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, vocab_size=VOCABULARY
    )
    reduce, gather = data_bytes(model_sizes(model, VOCABULARY), ParallelSection(), ParallelSizes(2, 1, 1))
    assert found["reduce_scatter_tensor"] == pytest.approx(reduce, rel=0.02)
    # The formula assumes bf16 weights, but the CPU run has fp32 weights.
    assert found["all_gather_into_tensor"] == pytest.approx(gather * 2, rel=0.02)
    assert found["all_reduce"] < BOOKKEEPING_BYTES


def test_tensor_parallel_ranks_send_four_activations_a_layer() -> None:
    found = counted("tp")
    # With two ranks an all-reduce sends a buffer once. There are four in each layer and one for the embedding's output.
    # Two of the last layer belong to its MLP, which processes only targets, padded to a multiple of 16.
    read = -(-found["targets"] // 16) * 16
    activations = ((4 * LAYERS - 1) * found["tokens"] + 2 * read) * HIDDEN * FP32
    # The output layer sends the gradient of the targets' hidden states, and three numbers a target.
    head = found["targets"] * (HIDDEN + 3) * FP32
    # Norms are replicated and process the whole sequence, so nothing is sent for them.
    assert found["all_reduce"] == pytest.approx(activations + head, abs=BOOKKEEPING_BYTES)
    assert found.get("all_gather_into_tensor", 0) == found.get("reduce_scatter_tensor", 0) == 0
