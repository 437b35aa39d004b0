"""Bytes that ranks send in a step, counted at the collectives, against the formulas that plans are made with."""

import json
import subprocess
import sys

import pytest

from benchmarks.communication import FFN, HEADS, HIDDEN, LAYERS, VOCABULARY
from offline_align.config.sections import ModelSection, ParallelSection
from offline_align.estimate.sizes import ParallelSizes, model_sizes
from offline_align.estimate.step_time import data_bytes

pytestmark = pytest.mark.distributed

# What is logged and the norm: a few numbers a step.
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
    # The formula is for bf16 weights, which the CPU run has in fp32.
    assert found["all_gather_into_tensor"] == pytest.approx(gather * 2, rel=0.02)
    assert found["all_reduce"] < BOOKKEEPING_BYTES


def test_tensor_parallel_ranks_send_four_activations_a_layer() -> None:
    found = counted("tp")
    # Two ranks: an all-reduce sends a buffer once. Four in each layer, one for the embedding's output. Two of the last
    # layer are those of its MLP, which sees targets alone, filled up to sixteens.
    read = -(-found["targets"] // 16) * 16
    activations = ((4 * LAYERS - 1) * found["tokens"] + 2 * read) * HIDDEN * FP32
    # The output layer: the gradient of the hidden states of targets, and three numbers a target.
    head = found["targets"] * (HIDDEN + 3) * FP32
    # Norms are whole on every rank and see the whole sequence, so that none of them is sent.
    assert found["all_reduce"] == pytest.approx(activations + head, abs=BOOKKEEPING_BYTES)
    assert found.get("all_gather_into_tensor", 0) == found.get("reduce_scatter_tensor", 0) == 0
