"""Transformer Engine's layers and optimizer agree with the torch backend and read its checkpoints."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.config.sections import OptimSection
from tests.engine_on_cpu import SOURCES
from tests.faults.forks import Forks
from tests.training import STEPS, TINY, continued, metrics, pairs, samples, train, write_jsonl
from tests.updates import DECAY_ALONE, decayed_weights, expected, largest_error, read

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
    """A run of the torch backend with one thread, as in forked commands."""
    from offline_align.distributed import setup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_cores", lambda: 1)
        return train("sft", tmp_path_factory.mktemp("torch") / "run", rows)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Run commands in forks in which Transformer Engine is installed."""
    # megatron passes its choices to Transformer Engine in environment variables, also in this process.
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            patch.delenv(name)
        with Forks(tmp_path_factory.mktemp("forks"), engine=True) as made:
            yield made


BUILT_FROM_IT: Any = {"sabotage": ("built_from_engine", [])}


def on_engine(
    forks: Forks, folder: Path, data: Path, *words: str, stage: str = "sft", ranks: int = 1, code: int = 0, **how: Any
) -> Path:
    """Train with Transformer Engine installed, and with its layers unless `how` says otherwise."""
    command = [stage, f"run.dir={folder}", f"data.train={data}", *STEPS, *(words or TINY)]
    ended = forks.run(command, world=ranks, **(how or BUILT_FROM_IT))
    assert ended.codes == [code] * ranks, ended.said
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["model.qk_layernorm=true", "model.sliding_window=8", "trainer.recompute=full"],
        ["model.add_qkv_bias=true", "trainer.recompute=selective"],
    ],
    ids=["query-key norms, a window, full recomputation", "biases, selective recomputation"],
)
def test_a_step_equals_that_of_the_torch_backend(forks: Forks, tmp_path: Path, rows: Path, words: list[str]) -> None:
    expected = metrics(train("sft", tmp_path / "torch", rows, *words))
    found = metrics(on_engine(forks, tmp_path / "engine", rows, *TINY, *words))
    assert found == pytest.approx(expected, rel=1e-5)


def test_torchs_attention_is_used_if_no_kernel_supports_packed_rows(
    forks: Forks, tmp_path: Path, rows: Path, trained: Path
) -> None:
    """For example if cuDNN cannot be loaded. This is logged once, not by each layer."""
    command = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY, *STEPS]
    ended = forks.run(command, sabotage=("built_from_engine", [False, "fused"]))
    assert (ended.codes, ended.said.count("no attention for packed rows here")) == ([0], 1)
    assert metrics(tmp_path / "run") == pytest.approx(metrics(trained), rel=1e-5)


@pytest.mark.parametrize(
    "words", [[TP2], [TP2, "parallel.sequence_parallel=true"], ["parallel.context_parallel_size=2"], []]
)
def test_layouts_give_the_same_losses(
    forks: Forks, tmp_path: Path, rows: Path, trained: Path, words: list[str]
) -> None:
    found = on_engine(forks, tmp_path / "run", rows, *TINY, *words, ranks=2)
    assert metrics(found) == pytest.approx(metrics(trained), rel=1e-5)
    assert metrics(found, "grad_norm") == pytest.approx(metrics(trained, "grad_norm"), rel=1e-4)


def test_each_backend_continues_from_checkpoints_of_the_other(
    forks: Forks, tmp_path: Path, rows: Path, trained: Path
) -> None:
    engine = on_engine(forks, tmp_path / "engine", rows)
    expected = metrics(train("sft", tmp_path / "torch", rows, model=continued(trained)))
    crossed = metrics(on_engine(forks, tmp_path / "crossed", rows, *continued(trained)))
    back = metrics(train("sft", tmp_path / "back", rows, model=continued(engine)))
    assert crossed == pytest.approx(expected, rel=1e-5)
    assert back == pytest.approx(expected, rel=1e-4)


def test_reward_models_share_prompts(forks: Forks, tmp_path: Path, trained: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    expected = metrics(train("reward", tmp_path / "torch", data, model=continued(trained)))
    layout = (TP2, "parallel.sequence_parallel=true")
    found = on_engine(forks, tmp_path / "engine", data, *continued(trained), *layout, stage="reward", ranks=2)
    assert metrics(found) == pytest.approx(expected, rel=1e-4)


def test_its_presence_changes_nothing_on_the_cpu(forks: Forks, tmp_path: Path, rows: Path, trained: Path) -> None:
    """Its optimizer and norms support only CUDA, but megatron uses them whenever they are installed.

    Both runs have one thread, since another number of threads would change the order of summation.
    """
    assert metrics(on_engine(forks, tmp_path / "run", rows, sabotage=None)) == metrics(trained)


def test_conversion_does_not_depend_on_the_engine(forks: Forks, tmp_path: Path, trained: Path) -> None:
    """Neither the written weights nor the comparison with transformers depend on it."""
    command = ["convert", f"init.from={trained}", "convert.to=huggingface", "run.device=cpu"]
    assert run([*command, f"run.dir={tmp_path / 'torch'}"]) == 0
    ended = forks.run([*command, f"run.dir={tmp_path / 'engine'}"], **BUILT_FROM_IT)
    assert ended.code == 0, ended.said
    expected, found = (tmp_path / name / "model.safetensors" for name in ("torch", "engine"))
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("stage", "more"), [("sft", []), ("reward", []), ("reward", ["parallel.grad_reduce_in_fp32=false"])]
)
def test_a_precision_aware_optimizer_continues_bit_for_bit(
    forks: Forks, tmp_path: Path, rows: Path, stage: str, more: list[str]
) -> None:
    """With bf16 weights and their remainders, and the fp32 head of a reward model."""
    data = rows if stage == "sft" else write_jsonl(tmp_path / "pairs.jsonl", pairs())
    words = [*TINY, "trainer.precision=bf16", "optim.use_precision_aware_optimizer=true", *more]
    straight = on_engine(forks, tmp_path / "straight", data, *words, stage=stage)
    on_engine(forks, tmp_path / "parts", data, *words, "trainer.max_time=0.001", stage=stage, code=75)
    parts = on_engine(forks, tmp_path / "parts", data, *words, stage=stage)
    assert metrics(parts) == metrics(straight)
    assert metrics(parts, "grad_norm") == metrics(straight, "grad_norm")


@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_all_parameters_follow_adamw(forks: Forks, tmp_path: Path, rows: Path, optimizer: str) -> None:
    words = [*TINY, "model.qk_layernorm=true", "model.add_qkv_bias=true", "trainer.max_steps=10"]
    words += ["parallel.use_distributed_optimizer=false"] * (optimizer == "plain")
    on_engine(forks, tmp_path / "run", rows, *words, sabotage=("updates_recorded", [str(tmp_path), True]))
    done = read(tmp_path / "updates_0")
    assert len(done) == 10
    assert largest_error(done[-1]["after"], expected(done, OptimSection(lr=1e-2))) < 2e-6


def test_only_matrices_decay_with_a_precision_aware_optimizer(forks: Forks, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    words = [*TINY, *DECAY_ALONE, "trainer.precision=bf16", "optim.use_precision_aware_optimizer=true"]
    recorded: Any = {"sabotage": ("updates_recorded", [str(tmp_path), True])}
    on_engine(forks, tmp_path / "run", data, *words, "optim.lr=0.1", stage="reward", **recorded)
    done = read(tmp_path / "updates_0")
    assert len(done) == 5
    # The tolerance is half the spacing of bf16 just below 1. Decay in five updates would be 0.05.
    assert largest_error(done[-1]["after"], decayed_weights(done)) < 2**-9


def test_a_precision_aware_optimizer_is_saved_before_its_first_update(forks: Forks, tmp_path: Path, rows: Path) -> None:
    words = [*TINY, "trainer.precision=bf16", "optim.use_precision_aware_optimizer=true"]
    skipping: Any = {"sabotage": ("built_from_engine", [True])}
    straight = on_engine(forks, tmp_path / "straight", rows, *words, **skipping)
    on_engine(forks, tmp_path / "parts", rows, *words, "trainer.max_time=0.001", code=75, **skipping)
    parts = on_engine(forks, tmp_path / "parts", rows, *words)
    assert metrics(parts, "skipped_steps") == metrics(straight, "skipped_steps") == [1] * 5
    assert metrics(parts) == metrics(straight)
