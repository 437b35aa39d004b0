"""The arithmetic of step times against published runs and against sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from offline_align.__main__ import run
from offline_align.config.runs import ModelRun
from offline_align.config.sections import ParallelSection
from offline_align.estimate.hardware import NODES
from offline_align.estimate.sizes import ModelSizes, ParallelSizes, model_sizes
from offline_align.estimate.step_time import Work, data_bytes, fastest_layout, label_seconds, layout, step_time
from tests.runs import compose

H100, A100 = NODES["h100_80gb"], NODES["a100_80gb"]
BF16_GRADIENTS = ParallelSection(grad_reduce_in_fp32=False)


@pytest.fixture(scope="module")
def llama() -> ModelSizes:
    config = compose("sft", ["run.dir=x", "model=llama3_8b"]).config
    assert isinstance(config, ModelRun)
    return model_sizes(config.model, 128256)


def packed(rows: int, length: int = 4096) -> Work:
    return Work(rows * length, rows * length**2, rows * length, length)


@pytest.mark.parametrize(("gpus", "rows", "published"), [(8, 32, 1.32), (32, 128, 1.33)])
def test_nvidias_published_sft_steps_on_h100(llama: ModelSizes, gpus: int, rows: int, published: float) -> None:
    # NVIDIA dgxc-benchmarking, Llama 3 8B SFT, bf16, packed to 4096, TP1: seconds a step.
    ranks = ParallelSizes(gpus, 1, 1)
    assert step_time(llama, BF16_GRADIENTS, ranks, packed(rows), H100).total == pytest.approx(published, rel=0.05)


def test_a_7b_on_a100_is_within_a_tenth_of_the_published_rate() -> None:
    # MosaicML llm-foundry, MPT-7B, 8 x A100-80GB, sequence 2048: 4,641 tokens/s on each GPU. Two-matrix FFN of 4 h.
    mpt = ModelSizes(4096, 128, 4096, 4096, 4 * 4096 * 2 // 3, 32, 50432, tied=True)
    work = Work(64 * 2048, 64 * 2048**2, 64 * 2048, 8 * 2048)
    rate = work.tokens / 8 / step_time(mpt, BF16_GRADIENTS, ParallelSizes(8, 1, 1), work, A100).total
    assert rate == pytest.approx(4641, rel=0.10)


@pytest.mark.parametrize(
    ("scalar_head", "tokens", "squared", "targets", "measured"),
    [(False, 33085, 26496727, 16558, 0.745), (True, 25683, 18028715, 0, 0.495)],
    ids=["sft", "reward"],
)
def test_steps_that_were_measured_on_one_h100(
    llama: ModelSizes, scalar_head: bool, tokens: int, squared: int, targets: int, measured: float
) -> None:
    """Eight layers and rows of mixed lengths (docs/benchmarks.md), seconds a step with the torch backend."""
    eight = replace(llama, layers=8, scalar_head=scalar_head)
    found = step_time(eight, BF16_GRADIENTS, ParallelSizes(1, 1, 1), Work(tokens, squared, targets, 4096), H100)
    assert found.total == pytest.approx(measured, rel=0.07)


def test_labelling_that_was_measured_on_one_h100(llama: ModelSizes) -> None:
    seconds = label_seconds(replace(llama, scalar_head=True), 65830, 53444250, 1, H100)
    assert seconds == pytest.approx(1.509, rel=0.03)


@pytest.mark.parametrize(("tensor", "low", "high"), [(2, 0.85, 0.95), (4, 0.70, 0.85), (8, 0.55, 0.75)])
def test_tensor_parallelism_costs_what_is_usual_inside_a_node(
    llama: ModelSizes, tensor: int, low: float, high: float
) -> None:
    one = step_time(llama, BF16_GRADIENTS, ParallelSizes(8, 1, 1), packed(32), H100).total
    split = step_time(llama, BF16_GRADIENTS, ParallelSizes(8, tensor, 1), packed(32), H100).total
    assert low < one / split < high


def test_bytes_of_data_parallelism_by_hand(llama: ModelSizes) -> None:
    ranks = ParallelSizes(8, 2, 1)
    local = llama.parameters / 2
    assert data_bytes(llama, ParallelSection(), ranks) == pytest.approx((local * 4 * 3 / 4, local * 2 * 3 / 4))
    whole = replace(ParallelSection(), use_distributed_optimizer=False)
    assert data_bytes(llama, whole, ranks) == pytest.approx((2 * local * 4 * 3 / 4, 0))


def test_hidden_communication_costs_nothing_and_exposed_does(llama: ModelSizes) -> None:
    ranks = ParallelSizes(8, 1, 1)
    plain = replace(ParallelSection(), overlap_grad_reduce=False, overlap_param_gather=False)
    assert step_time(llama, ParallelSection(), ranks, packed(32), H100).data_communication == 0
    reduce, gather = data_bytes(llama, plain, ranks)
    exposed = step_time(llama, plain, ranks, packed(32), H100).data_communication
    assert exposed == pytest.approx((reduce + gather) / (450e9 * 0.8))


def test_8b_on_one_node_of_h100_needs_no_tensor_parallelism(llama: ModelSizes) -> None:
    tp4 = ParallelSection(tensor_model_parallel_size=4, sequence_parallel=True)
    best = fastest_layout(llama, tp4, "none", 8, packed(128), H100, groups=8)
    assert best is not None
    assert best.fits
    assert best.parallel.tensor_model_parallel_size == 1
    assert best.parallel.use_distributed_optimizer
    asked = layout(llama, tp4, "none", 8, packed(128), H100)
    assert best.time.total < asked.time.total / 1.1


def test_where_nothing_fits_there_is_no_advice(llama: ModelSizes) -> None:
    assert fastest_layout(llama, ParallelSection(), "none", 1, packed(8), NODES["a100_40gb"], groups=8) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel=tp4", "launcher.nproc_per_node=8", "run.device=cuda"], "parallel.tensor_model_parallel_size=1"),
        (["parallel=tp4", "launcher.nproc_per_node=8", "launcher.gpu=a100_40gb"], "none that fits is more than 5%"),
        (["launcher.nproc_per_node=8", "launcher.gpu=h100_80gb"], "does not fit"),
        (["launcher.nproc_per_node=1", "launcher.gpu=h100_80gb"], "nothing fits"),
    ],
)
def test_a_dry_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    arguments = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", "model.vocab_size=256000", *words]
    assert run([*arguments, "dry_run=true", "debug=true"]) == 0
    assert said in capsys.readouterr().out


def test_the_plan_of_a_reward_model_has_no_output_layer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run.dir=x", "model=gpt_8b", "parallel=tp4", "launcher.nproc_per_node=8", "launcher.gpu=h100_80gb"]
    assert run(["reward", *words, "dry_run=true"]) == 0
    # 8,523,091,968 of the policy less 256,000 rows of 4,096, and a head of 4,096.
    assert "parameters     7,474,520,064 (7.47 B)" in capsys.readouterr().out


COSTS = Path(__file__).resolve().parents[3] / "docs" / "cluster.md"


@pytest.mark.parametrize(
    ("stage", "rows", "tokens", "segments"),
    [
        ("sft", 100_000, 500, 1),
        ("reward", 40_000, 1000, 2),
        ("fa", 90_000, 500, 1),
        ("rwr", 180_000, 500, 1),
        ("ca", 180_000, 500, 1),
    ],
)
def test_the_costs_of_the_cluster_page(llama: ModelSizes, stage: str, rows: int, tokens: int, segments: int) -> None:
    """Steps, seconds a step and GPU hours on four nodes at the paper's layout."""
    tensor4 = ParallelSection(tensor_model_parallel_size=4, sequence_parallel=True)
    work = Work(
        tokens=128 * tokens,
        squared_lengths=128 * segments * (tokens // segments) ** 2,
        targets=0 if stage == "reward" else int(128 * tokens * 0.6),
        micro_batch_tokens=4096,
    )
    sizes = replace(llama, scalar_head=stage == "reward")
    cells = []
    for node in (H100, A100):
        seconds = step_time(sizes, tensor4, ParallelSizes(32, 4, 1), work, node).total
        cells.append(f"{seconds:.2f}, {rows / 128 * seconds * 32 / 3600:.1f}")
    line = f"| {stage}, {round(rows / 128):,} steps, TP 4 | {cells[0]} | {cells[1]} |"
    assert line in COSTS.read_text(encoding="utf-8")


def test_the_cost_of_labelling_on_the_cluster_page(llama: ModelSizes) -> None:
    answers = 180_000
    sizes = replace(llama, scalar_head=True)
    seconds = [label_seconds(sizes, answers * 500, answers * 500**2, 32, node) for node in (H100, A100)]
    cells = " | ".join(f"{s:.0f} s in all, {s * 32 / 3600:.1f}" for s in seconds)
    assert f"| label, TP 1 | {cells} |" in COSTS.read_text(encoding="utf-8")
