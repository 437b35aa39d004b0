"""The sizes and the memory that `dry_run=true` prints, without writing anything."""

from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.config.runs import LabelRun
from offline_align.config.sections import ComputeSection, Device, ModelSection, Precision, RunSection
from offline_align.estimate.sizes import model_sizes
from offline_align.stages.dry_run import print_label_dry_run
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    assert (
        run(
            [
                "sft",
                f"run.dir={tmp_path / 'run'}",
                "model=gpt_8b",
                "parallel=tp4",
                "launcher.nproc_per_node=8",
                "dry_run=true",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    for expected in (
        "8,523,091,968",
        "tensor 4 x context 1 x data 2",
        "torchrun --nproc-per-node=8",
        "memory a rank",
    ):
        assert expected in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "weights", "advises"),
    [
        ([], 3.97, True),
        (["trainer.precision=fp32"], 7.94, False),
        (["run.device=cpu"], 7.94, False),
        # The advice on layouts is only for GPUs.
        (["run.device=cpu", "trainer.precision=bf16"], 3.97, False),
    ],
)
def test_a_dry_run_of_training_counts_weights_in_the_precision_of_the_run(
    words: list[str], weights: float, advises: bool, tmp_path: Path, capsys: Any
) -> None:
    common = [f"run.dir={tmp_path / 'run'}", "model=gpt_8b", "parallel=tp4", "launcher.nproc_per_node=8"]
    assert run(["sft", *common, *words, "dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert f"weights {weights}," in text
    assert ("step time" in text) is advises


@pytest.mark.parametrize(
    ("device", "precision", "size"),
    [(Device.auto, Precision.auto, 2), (Device.cpu, Precision.auto, 4), (Device.cpu, Precision.bf16, 2)],
)
def test_a_dry_run_of_labelling_counts_weights_in_the_precision_of_the_run(
    device: Device, precision: Precision, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelSection(
        vocab_size=32_000, num_layers=2, hidden_size=4096, ffn_hidden_size=8192, num_attention_heads=32
    )
    place = RunSection(dir="unused", device=device)
    config = LabelRun(run=place, model=model, trainer=ComputeSection(precision=precision))
    print_label_dry_run(Job(STAGES["label"], config))
    expected = model_sizes(model, 32_000, scalar_head=True).rank_bytes(1, size) / 2**30
    assert f"weights {expected:.2f}, activations" in capsys.readouterr().out
