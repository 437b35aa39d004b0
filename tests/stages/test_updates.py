"""Every parameter of a trained model equals AdamW's in float64, also after a continuation."""

from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.config.sections import OptimSection
from tests.training import STEPS, TINY, pairs, samples, train, write_jsonl
from tests.updates import DECAY_ALONE, decayed_weights, expected, largest_error, read, recording

VECTORS = ["model.qk_layernorm=true", "model.add_qkv_bias=true"]
PLAIN = "parallel.use_distributed_optimizer=false"


@pytest.fixture
def updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file with the updates of this test's training run."""
    from offline_align.train.step import TrainStep

    path = tmp_path / "updates"
    monkeypatch.setattr(TrainStep, "_update", recording(TrainStep._update, path))
    return path


@pytest.mark.parametrize("words", [[], [PLAIN]], ids=["distributed optimizer", "plain optimizer"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_all_parameters_follow_adamw(updates: Path, tmp_path: Path, stage: str, words: list[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", samples() if stage == "sft" else pairs())
    train(stage, tmp_path / "run", data, *VECTORS, "trainer.max_steps=10", *words)
    done = read(updates)
    assert len(done) == 10
    assert {weight.dim() for weight in done[0]["before"].values()} == {1, 2}
    # The tolerance allows for ten roundings to fp32 of weights up to 1.
    assert largest_error(done[-1]["after"], expected(done, OptimSection(lr=1e-2))) < 2e-6


@pytest.mark.parametrize("words", [[], [PLAIN]], ids=["distributed optimizer", "plain optimizer"])
def test_only_matrices_decay(updates: Path, tmp_path: Path, words: list[str]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", samples())
    train("sft", tmp_path / "run", data, *VECTORS, *DECAY_ALONE, "trainer.max_steps=10", *words)
    done = read(updates)
    norms = {name: weight for name, weight in done[-1]["after"].items() if "norm" in name}
    assert len(norms) == 9
    assert all(weight.sub(1).abs().max() < 1e-4 for weight in norms.values())
    assert largest_error(done[-1]["after"], decayed_weights(done)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("words", [[], [PLAIN]], ids=["distributed optimizer", "plain optimizer"])
def test_vectors_no_longer_decay_after_an_earlier_checkpoint(
    updates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, words: list[str]
) -> None:
    """Earlier versions decayed all parameters and stored this for every group in their checkpoints."""
    from offline_align.train import step

    def all_decay(optimizer: Any, learning_rate: float) -> None:
        for group in optimizer.param_groups:
            group |= {"lr": learning_rate, "weight_decay": 0.1}

    data = write_jsonl(tmp_path / "rows.jsonl", samples())
    command = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={data}", *TINY, *STEPS, *VECTORS, *words]
    command += [*DECAY_ALONE, "optim.lr=0.1", f"trainer.precision={precision}"]
    with monkeypatch.context() as earlier:
        earlier.setattr(step, "set_rates", all_decay)
        assert run([*command, "trainer.max_time=0.001"]) == 75
        assert float(read(updates)[-1]["after"]["decoder.final_layernorm.weight"].max()) < 0.995
    assert run(command) == 0
    _, *done = read(updates)
    assert len(done) == 4
    # The tolerance is half the spacing of bf16 just below 1, plus the effect of the gradients.
    allowed = 2**-9 if precision == "bf16" else 2e-4
    assert largest_error(done[-1]["after"], decayed_weights(done)) < allowed
