"""Transformer Engine's layers and optimizer give what the torch backend gives, and read its checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.engine_on_cpu import SOURCES
from tests.training import STEPS, TINY, continued, metrics, pairs, samples, train, write_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (SOURCES / "transformer_engine").is_dir(), reason=f"no sources of Transformer Engine in {SOURCES}"
    ),
]
TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", samples())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    return train("sft", tmp_path_factory.mktemp("torch") / "run", rows)


def on_engine(backend: str, stage: str, folder: Path, data: Path, *words: str, ranks: int = 1, code: int = 0) -> Path:
    """Train in a process of its own where Transformer Engine is installed, and return the run folder."""
    command = [stage, f"run.dir={folder}", f"data.train={data}", *(words or TINY), *STEPS]
    run_on_engine(backend, command, ranks, code)
    return folder


def run_on_engine(backend: str, command: list[str], ranks: int = 1, code: int = 0) -> None:
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    start = [sys.executable, "-m", *torchrun, "tests.engine_on_cpu", backend]
    # megatron tells Transformer Engine its choices so, those of this process too.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    done = subprocess.run([*start, *command], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr[-4000:]


@pytest.mark.parametrize(
    "words",
    [
        ["model.qk_layernorm=true", "model.sliding_window=8", "trainer.recompute=full"],
        ["model.add_qkv_bias=true", "trainer.recompute=selective"],
    ],
    ids=["query-key norms, a window, full recomputation", "biases, selective recomputation"],
)
def test_a_step_is_that_of_the_torch_backend(tmp_path: Path, rows: Path, words: list[str]) -> None:
    expected = metrics(train("sft", tmp_path / "torch", rows, *words))
    found = metrics(on_engine("engine", "sft", tmp_path / "engine", rows, *TINY, *words))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "words", [[TP2], [TP2, "parallel.sequence_parallel=true"], ["parallel.context_parallel_size=2"], []]
)
def test_layouts_give_the_same_losses(tmp_path: Path, rows: Path, trained: Path, words: list[str]) -> None:
    found = on_engine("engine", "sft", tmp_path / "run", rows, *TINY, *words, ranks=2)
    assert metrics(found) == pytest.approx(metrics(trained), rel=1e-5)
    assert metrics(found, "grad_norm") == pytest.approx(metrics(trained, "grad_norm"), rel=1e-4)


def test_each_backend_goes_on_from_checkpoints_of_the_other(tmp_path: Path, rows: Path, trained: Path) -> None:
    engine = on_engine("engine", "sft", tmp_path / "engine", rows)
    expected = metrics(train("sft", tmp_path / "torch", rows, model=continued(trained)))
    crossed = metrics(on_engine("engine", "sft", tmp_path / "crossed", rows, *continued(trained)))
    back = metrics(train("sft", tmp_path / "back", rows, model=continued(engine)))
    assert crossed == pytest.approx(expected, rel=1e-5)
    assert back == pytest.approx(expected, rel=1e-4)


def test_reward_models_share_prompts(tmp_path: Path, trained: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    expected = metrics(train("reward", tmp_path / "torch", data, model=continued(trained)))
    layout = (TP2, "parallel.sequence_parallel=true")
    found = on_engine("engine", "reward", tmp_path / "engine", data, *continued(trained), *layout, ranks=2)
    assert metrics(found) == pytest.approx(expected, rel=1e-4)


def test_its_presence_changes_nothing_on_the_cpu(tmp_path: Path, rows: Path, trained: Path) -> None:
    """Its optimizer and its norms are for CUDA alone, and megatron takes them wherever it finds them."""
    assert metrics(on_engine("torch", "sft", tmp_path / "run", rows)) == metrics(trained)


def test_conversion_does_not_depend_on_the_engine(tmp_path: Path, trained: Path) -> None:
    """Weights that are written, and the comparison with transformers that follows."""
    command = ["convert", f"init.from={trained}", "convert.to=huggingface", "run.device=cpu"]
    assert run([*command, f"run.dir={tmp_path / 'torch'}"]) == 0
    run_on_engine("engine", [*command, f"run.dir={tmp_path / 'engine'}"])
    expected, found = (tmp_path / name / "model.safetensors" for name in ("torch", "engine"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("stage", "more"), [("sft", []), ("reward", []), ("reward", ["parallel.grad_reduce_in_fp32=false"])]
)
def test_a_run_with_half_an_optimizer_goes_on_to_the_bit(
    tmp_path: Path, rows: Path, stage: str, more: list[str]
) -> None:
    """Weights in bf16 and their remainders, and beside them the fp32 head of a reward model."""
    data = rows if stage == "sft" else write_jsonl(tmp_path / "pairs.jsonl", pairs())
    words = [*TINY, "trainer.precision=bf16", "optim.use_precision_aware_optimizer=true", *more]
    straight = on_engine("engine", stage, tmp_path / "straight", data, *words)
    on_engine("engine", stage, tmp_path / "parts", data, *words, "trainer.max_time=0.001", code=75)
    parts = on_engine("engine", stage, tmp_path / "parts", data, *words)
    assert metrics(parts) == metrics(straight)
    assert metrics(parts, "grad_norm") == metrics(straight, "grad_norm")


def test_half_an_optimizer_is_saved_before_its_first_update(tmp_path: Path, rows: Path) -> None:
    words = [*TINY, "trainer.precision=bf16", "optim.use_precision_aware_optimizer=true"]
    skipping = "engine without a first update"
    straight = on_engine(skipping, "sft", tmp_path / "straight", rows, *words)
    on_engine(skipping, "sft", tmp_path / "parts", rows, *words, "trainer.max_time=0.001", code=75)
    parts = on_engine("engine", "sft", tmp_path / "parts", rows, *words)
    assert metrics(parts, "skipped_steps") == metrics(straight, "skipped_steps") == [1] * 5
    assert metrics(parts) == metrics(straight)
