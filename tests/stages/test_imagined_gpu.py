"""The CUDA code on an imagined GPU: devices, types, waits and memory, but no values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.imagined_gpu import Unavailable, environment
from benchmarks.memory import Layout
from offline_align.config.sections import ModelSection
from tests.engine_on_cpu import SOURCES
from tests.preloaded import python
from tests.training import STEPS, TINY, metrics, samples, write_jsonl

pytestmark = pytest.mark.slow

# Large enough for several buckets of 40 million elements, so that communication overlaps as in a large model.
SEVERAL_BUCKETS = ModelSection(
    num_layers=2,
    hidden_size=2048,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    num_query_groups=4,
    vocab_size=100_000,
    qk_layernorm=True,
    add_qkv_bias=True,
)
LAYOUTS = [
    Layout(world=1),
    Layout(world=8, tensor=4, grad_reduce_in_fp32=True),
    Layout(world=8, tensor=4, sequence_parallel=True, recompute="selective"),
    Layout(world=8, tensor=2, sequence_parallel=True, context=2, recompute="full"),
    Layout(world=2, use_distributed_optimizer=False),
    Layout(world=8, tensor=4, sequence_parallel=True, kind="reward_model", share_prompts=True),
    Layout(world=4, context=2, kind="reward_model"),
]
TRACE = """
import json, sys
from dataclasses import asdict
from benchmarks.memory import trace
from tests.stages.test_imagined_gpu import LAYOUTS, SEVERAL_BUCKETS
print("FOUND", json.dumps([asdict(trace(SEVERAL_BUCKETS, layout, rank=layout.world - 1)) for layout in LAYOUTS]))
"""


NEEDS_ENGINE = pytest.mark.skipif(
    not (SOURCES / "transformer_engine").is_dir(), reason=f"no sources of Transformer Engine in {SOURCES}"
)


@pytest.fixture(scope="module")
def imagined(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        return environment(tmp_path_factory.mktemp("library"))
    except Unavailable as error:
        pytest.skip(str(error))


def on_imagined_gpu(variables: dict[str, str], code: str, engine: bool = False) -> str:
    program = python("imagined_gpu_with_engine" if engine else "imagined_gpu", **variables)
    command, environment = [program, "-W", "ignore", "-c", code], os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("engine", [False, pytest.param(True, marks=NEEDS_ENGINE)])
def test_steps_run_in_every_layout_and_wait_twice(imagined: dict[str, str], engine: bool) -> None:
    """The last rank of each layout has all tensors on the right device and never waits per micro-batch."""
    out = on_imagined_gpu(imagined, TRACE, engine)
    found = json.loads(next(line for line in out.splitlines() if line.startswith("FOUND")).removeprefix("FOUND"))
    assert len(found) == len(LAYOUTS)
    for layout, traced in zip(LAYOUTS, found, strict=True):
        assert len(traced["waits"]) == 2, f"{layout}: {traced['waits']}"
        assert all("clip_grads" in line or "train/step" in line for line in traced["waits"])
        assert traced["left_to_autograd"] == (["reward_head.weight"] if layout.kind == "reward_model" else [])


def test_labelling_waits_only_for_copies(imagined: dict[str, str]) -> None:
    """With bins in pinned memory, shared prompts, and scores copied while the next bin is computed."""
    code = """
import torch
from benchmarks.imagined_gpu import imagined_rank
from benchmarks.memory import Layout
from offline_align.data.bins import SampleSource
from offline_align.distributed.setup import Ranks
from tests.stages.test_imagined_gpu import SEVERAL_BUCKETS
from tests.unit.data.test_loader import tokenized
layout = Layout(world=8, tensor=4, sequence_parallel=True, kind="reward_model")
lengths = [280, 20, 180, 80, 70, 480, 40] * 8
answers = [[number % 4] * 20 + [4 + number] * length for number, length in enumerate(lengths)]
source = SampleSource(tokenized(answers, [20] * 56), share_prompts=True)
with imagined_rank(layout.parallel, layout.world) as gpu:
    from offline_align.label.scoring import score_bins
    from offline_align.model.passes import plan_bins
    from offline_align.model.build import build_model
    ranks = Ranks(0, 8, 0, 2, 0, 4, 0, 1, torch.device("cuda", 0))
    model = build_model("reward_model", SEVERAL_BUCKETS, layout.parallel, ranks.device, True).eval()
    bins = plan_bins(source, 1024)
    gpu.forget()
    once = sum(source.size(rows).tokens for rows in bins)
    scored = sum(len(scores) for scores in score_bins(model, source, bins, ranks))
    print(len(bins), source.num_tokens() - once, scored, sum(gpu.waits.values()))
"""
    # All rows of a bin share the prompt of 20 tokens, which the first row holds.
    assert on_imagined_gpu(imagined, code).split() == ["12", str((56 - 12) * 20), "56", "0"]


def test_labelling_with_8b_uses_the_memory_of_the_dry_run(imagined: dict[str, str]) -> None:
    code = """
import torch
from benchmarks.imagined_gpu import imagined_rank
from benchmarks.memory import Layout, llama3_8b, rows_of
from offline_align.data.bins import SampleSource
from offline_align.distributed.setup import Ranks
from offline_align.estimate.sizes import ParallelSizes, model_sizes, scoring_memory
for tensor in (1, 4):
    layout = Layout(world=tensor, tensor=tensor)
    sizes, ranks = model_sizes(llama3_8b(), 128256, scalar_head=True), ParallelSizes(tensor, tensor, 1)
    planned = scoring_memory(sizes, layout.parallel, ranks, 16384, True)
    with imagined_rank(layout.parallel, tensor) as gpu:
        from offline_align.label.scoring import score_bins
        from offline_align.model.passes import plan_bins
        from offline_align.model.build import build_model
        ranks = Ranks(0, tensor, 0, 1, 0, tensor, 0, 1, torch.device("cuda", 0))
        model = build_model("reward_model", llama3_8b(), layout.parallel, ranks.device, True).eval()
        source = SampleSource(rows_of([4096] * 8))
        scored = list(score_bins(model, source, plan_bins(source, 16384), ranks))
        print(len(scored), gpu.peak_bytes / planned.total)
"""
    found = [line.split() for line in on_imagined_gpu(imagined, code).splitlines()]
    assert [bins for bins, _ in found] == ["2", "2"]
    assert all(0.99 < float(ratio) < 1.01 for _, ratio in found), found


def test_a_save_of_8b_copies_a_share_of_the_state_to_the_host(imagined: dict[str, str]) -> None:
    """A load needs as much on the host. Neither needs additional memory on the GPU."""
    code = """
import torch
from benchmarks.imagined_gpu import imagined_rank
from benchmarks.memory import Layout, llama3_8b, micro_batches, train_step
layout = Layout(world=8)
with imagined_rank(layout.parallel, layout.world, 7) as gpu:
    from offline_align.train import checkpoint, optimizer_state
    step = train_step(llama3_8b(), layout)
    step(micro_batches(layout, 1, 7), 1e-5)
    gpu.forget()
    held = gpu.held_bytes
    weights = checkpoint.sharded_weights(step.model.module)
    saved, wanted = (make(step.optimizer, weights) for make in (optimizer_state.to_save, optimizer_state.to_load))
    tensors = [box.data for kinds in saved["param_state"].values() for boxes in kinds.values() for box in boxes]
    # Views into a larger copy would be copied again when the file is written.
    assert all(t.device.type == "cpu" and t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    loaded = {
        number: {kind: [torch.empty(box.local_shape) for box in boxes] for kind, boxes in kinds.items()}
        for number, kinds in wanted["param_state"].items()
    }
    optimizer_state.load_state(step.optimizer, saved | {"param_state": loaded})
    print(sum(tensor.nbytes for tensor in tensors), gpu.peak_bytes - held)
"""
    on_host, on_gpu = map(int, on_imagined_gpu(imagined, code).split())
    # Main weights and two moments in fp32. Ranks differ by the padding of the buckets.
    assert on_host == pytest.approx(8_030_261_248 * 12 / 8, rel=1e-3)
    assert on_gpu == 0


def test_a_tensor_on_the_wrong_device_is_found(imagined: dict[str, str]) -> None:
    code = """
import torch
from benchmarks.imagined_gpu import imagined_rank
from offline_align.config.sections import ParallelSection
with imagined_rank(ParallelSection(), 1) as gpu:
    here, there = torch.ones(1000, 3, device="cuda"), torch.ones(3)
    held = gpu.held_bytes
    float(here.sum())
    try:
        here + there
    except RuntimeError as error:
        assert "two devices" in str(error), error
        print(held, gpu.peak_bytes - held, sum(gpu.waits.values()))
"""
    assert on_imagined_gpu(imagined, code).split() == ["12288", "512", "1"]


@pytest.mark.parametrize("engine", [False, pytest.param(True, marks=NEEDS_ENGINE)])
def test_memory_and_work_of_an_8b_step_match_the_estimates(imagined: dict[str, str], engine: bool) -> None:
    """The memory of the dry run, and the work behind `mfu` except that of attention."""
    code = """
from dataclasses import replace
from benchmarks.memory import Layout, llama3_8b, trace
from offline_align.estimate.sizes import model_sizes
model = replace(llama3_8b(), num_layers=12)
for layout in (
    Layout(tensor=4),
    Layout(tensor=4, recompute="full"),
    Layout(tensor=2, context=2),
    Layout(tensor=4, sequence_parallel=True, kind="reward_model"),
):
    traced = trace(model, layout, count=1)
    # A bin of three rows, in which all tokens but the first of each row are targets, or of three pairs with
    # six scores.
    scalar = layout.kind == "reward_model"
    targets = 6 if scalar else layout.tokens - 3
    read = layout.tokens if layout.sequence_parallel else targets
    flops = model_sizes(model, 128256, scalar_head=scalar).train_flops(layout.tokens, 0, targets, read)
    # Full recomputation repeats the forward pass of the layers.
    flops += (flops - 6 * 128256 * 4096 * targets) / 3 if layout.recompute == "full" else 0
    print(traced.peak_bytes / traced.planned_bytes, traced.product_flops * layout.tensor * layout.context / flops)
"""
    out = on_imagined_gpu(imagined, code, engine)
    memory, work = zip(*(map(float, line.split()) for line in out.splitlines()), strict=True)
    # The stand-in for Transformer Engine's fused optimizer may make copies, which the real one does not.
    assert all(0.98 < ratio < (1.06 if engine else 1.02) for ratio in memory), memory
    assert work == pytest.approx([1] * 4, rel=2e-3)


def test_the_cpu_can_be_chosen_on_a_machine_with_a_gpu(imagined: dict[str, str], tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY, *STEPS]
    assert "run.device=cpu" in words
    command = [sys.executable, "-m", "offline_align", *words]
    done = subprocess.run(command, env=os.environ | imagined, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(tmp_path / "run")[-1] < metrics(tmp_path / "run")[0]
