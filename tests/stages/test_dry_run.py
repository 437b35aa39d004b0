"""The sizes and the memory that `dry_run=true` prints, without writing anything."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.config.runs import LabelRun, TrainRun
from offline_align.config.sections import (
    ComputeSection,
    Device,
    ModelSection,
    ParallelSection,
    Precision,
    RunSection,
)
from offline_align.data.tokenizer import HuggingFaceTokenizer
from offline_align.estimate import host
from offline_align.estimate.host import Gpu
from offline_align.estimate.sizes import ParallelSizes, model_sizes, training_memory
from offline_align.stages.dry_run import print_label_dry_run
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES
from tests.runs import compose
from tests.small_tokenizers import write_hugging_face
from tests.training import TINY, labelled, pairs, samples, train, write_jsonl


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
        (["launcher.gpu=a100_80gb"], 3.97, True),
        (["launcher.gpu=a100_80gb", "trainer.precision=fp32"], 7.94, False),
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
    [(Device.cuda, Precision.auto, 2), (Device.cpu, Precision.auto, 4), (Device.cpu, Precision.bf16, 2)],
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


def test_the_launch_line_can_be_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.input=[a.jsonl,b.jsonl]", "data.source_column=a b", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["offline-align", "label", *words])
    model = ModelSection(
        vocab_size=32_000, num_layers=2, hidden_size=4096, ffn_hidden_size=8192, num_attention_heads=32
    )
    print_label_dry_run(Job(STAGES["label"], LabelRun(run=RunSection(dir="unused"), model=model)))
    assert capsys.readouterr().out.rstrip().endswith("label data.input=[a.jsonl,b.jsonl] 'data.source_column=a b'")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], None]:
    """Return a function that sets the GPU of this machine, and fix its CPU."""
    monkeypatch.setattr(host, "product_flops", lambda: 1e11)
    monkeypatch.setattr(host, "cores", lambda: 2)

    def set_gpu(gpu: Gpu | None) -> None:
        monkeypatch.setattr(host, "first_gpu", lambda: gpu)

    set_gpu(None)
    return set_gpu


H200 = Gpu("NVIDIA H200", 150_754_820_096.0)


@pytest.mark.parametrize(
    ("gpu", "words", "device", "memory"),
    [
        (None, [], "CPU of this machine, 2 cores (no GPU here; launcher.gpu plans for one), fp32", "process 0.90"),
        (None, ["run.device=cuda"], "H100 80GB (launcher.gpu is not set), bf16", "weights"),
        (None, ["launcher.nodes=2"], "H100 80GB (launcher.gpu is not set), bf16", "weights"),
        (None, ["launcher.gpu=a100_40gb"], "A100 40GB (launcher.gpu), bf16", "weights"),
        (None, ["run.device=cpu", "launcher.gpu=a100_40gb"], "CPU of this machine, 2 cores (run.device=cpu)", "proc"),
        (H200, [], "NVIDIA H200 of this machine, bf16", "weights"),
        (H200, ["launcher.nodes=2"], "H100 80GB (launcher.gpu is not set), bf16", "weights"),
        (H200, ["run.device=cpu"], "CPU of this machine, 2 cores (run.device=cpu), fp32", "process 0.90"),
    ],
)
def test_the_plan_is_for_the_device_that_would_run(
    here: Callable[[Gpu | None], None],
    gpu: Gpu | None,
    words: list[str],
    device: str,
    memory: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here(gpu)
    assert run(["sft", "run.dir=x", "model=smollm2_135m", "dry_run=true", *words]) == 0
    shown = capsys.readouterr().out
    assert device in shown
    assert memory in shown
    assert ("layout  " in shown) is ("CPU" not in device)


def test_the_memory_on_a_cpu_is_what_runs_have_held() -> None:
    """The peak resident memory of SmolLM2-135M in fp32, with the largest bin of each run."""
    config = compose("sft", ["run.dir=x", "model=smollm2_135m"]).config
    assert isinstance(config, TrainRun)
    sizes = model_sizes(config.model, 49152)
    for tokens, held in ((461, 3.73), (1009, 4.49), (3077, 7.90)):
        planned = training_memory(sizes, ParallelSection(), ParallelSizes(1, 1, 1), tokens, False, "none").on_cpu()
        assert planned.total / 2**30 == pytest.approx(held, rel=0.05)


def plan(stage: str, data: Path, *words: str) -> int:
    """Run the dry run of a training stage with a tiny model."""
    return run(
        [stage, "run.dir=out", f"data.train={data}", *TINY, "dry_run=true", "trainer.global_batch_size=4", *words]
    )


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_dry_run_reads_rows_and_writes_nothing(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(in_folder / "rows.jsonl", samples(14))
    assert plan("sft", data, "trainer.max_epochs=2", f"data.valid={data}") == 0
    shown = capsys.readouterr().out
    for text in (
        "data.train: 14, all read",
        "data.valid: 14, all read",
        "0 prompts truncated to 128 tokens",
        "7 steps, which is 2 epochs of 14 rows",
        "micro-batches on each data parallel rank",
        "tokens/s on each rank",
        "first row, as the model sees it:\ns0: ",
        "  prompt    User:Name redAssistant:\\x20\n  target    red</s>\n",
    ):
        assert text in shown, (text, shown)
    assert [path.name for path in in_folder.iterdir()] == ["rows.jsonl"]


@pytest.mark.usefixtures("here")
def test_ranks_share_the_cpu_so_the_time_of_a_step_stays(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(in_folder / "rows.jsonl", samples(14))
    shown = []
    for ranks in (1, 2):
        assert plan("sft", data, f"launcher.nproc_per_node={ranks}") == 0
        text = capsys.readouterr().out
        rate = float(re.findall(r"about ([\d,]+) tokens/s on each rank", text)[0].replace(",", ""))
        shown.append((rate, re.findall(r"^time +(.*)$", text, re.MULTILINE)))
    assert shown[0][0] == pytest.approx(2 * shown[1][0], rel=0.01)
    assert shown[0][1] == shown[1][1] != []


def test_a_dry_run_reads_a_sample_of_many_rows(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = samples(30)
    rows[2]["response"] = "red " * 200  # longer than data.max_length
    data = write_jsonl(in_folder / "rows.jsonl", rows)
    assert plan("sft", data, "data.dry_run_rows=10") == 0
    shown = capsys.readouterr().out
    assert "data.train: 30, 10 of them read (data.dry_run_rows=null reads all)" in shown
    assert "about 8 steps, which is 1 epoch of 30 rows" in shown
    assert plan("sft", data, "data.dry_run_rows=null") == 0
    shown = capsys.readouterr().out
    assert "data.train: 30, all read" in shown and "left out: 1 response_too_long" in shown
    assert plan("sft", data, "data.dry_run_rows=0") == 0
    assert "not read: data.dry_run_rows=0" in capsys.readouterr().out
    assert plan("sft", data, "data.dry_run_rows=-1") == 78


def test_bad_rows_are_named_after_the_plan_with_the_exit_code_of_the_run(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = samples(8)
    del rows[3]["response"]
    rows[5]["response"] = ""
    data = write_jsonl(in_folder / "rows.jsonl", rows)
    assert plan("sft", data) == 65
    shown = capsys.readouterr()
    assert "2 would end the run with exit code 65: 1 response: missing, 1 response: empty" in shown.out
    assert "rows.jsonl:4: response: missing; fix the row" in shown.err and "(and 1 more bad rows)" in shown.err
    assert plan("sft", data, "data.on_bad_row=skip") == 0
    shown = capsys.readouterr()
    assert "2 would be skipped: 1 response: missing, 1 response: empty" in shown.out
    assert "1.5 epochs" not in shown.out and "of 6 rows" in shown.out


def test_a_dry_run_refuses_what_the_method_refuses(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(in_folder / "labelled.jsonl", labelled([1.0, -1.0, 0.5, 2.0]))
    assert plan("fa", data, "method.threshold=9") == 78
    assert "keeps none of 4 rows" in capsys.readouterr().err
    assert plan("fa", data) == 0
    assert "the run has only 1 step" in capsys.readouterr().out


def test_the_first_row_shows_condition_and_weight(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(in_folder / "labelled.jsonl", labelled([1.0, -1.0, 0.5, 2.0]))
    assert plan("ca", data) == 0
    assert "  condition <rm_score>1.0\n  target    red</s>\n" in capsys.readouterr().out
    assert plan("rwr", data, "method.beta=1") == 0
    assert "weight 0.897" in capsys.readouterr().out
    data = write_jsonl(in_folder / "pairs.jsonl", pairs(4))
    assert plan("reward", data) == 0
    # Rows of a reward model are encoded whole, so the first token of an answer has the space before it.
    assert "  chosen     red please</s>\n  rejected   redred</s>\n" in capsys.readouterr().out


def test_answers_that_pairs_are_made_of_are_all_read(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = labelled([float(k) for k in range(12)])
    for k, row in enumerate(rows):
        row["prompt"] = f"Name {k // 2}"
    data = write_jsonl(in_folder / "labelled.jsonl", rows)
    assert plan("dpo", data, "data.dry_run_rows=2") == 0
    shown = capsys.readouterr().out
    assert "data.train: 12, all read" in shown and "of 6 rows" in shown
    assert "  chosen    " in shown and "  rejected  " in shown


def test_a_run_of_one_step_is_a_warning_before_and_after(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", samples(3))
    words = ["trainer.max_steps=null", "trainer.global_batch_size=8"]
    with caplog.at_level("INFO"):
        train("sft", tmp_path / "run", data, *words)
    said = [record.message for record in caplog.records]
    warnings = [k for k, text in enumerate(said) if "only 1 step: trainer.global_batch_size=8 takes all 3 rows" in text]
    done = next(k for k, text in enumerate(said) if "done after 1 step," in text)
    assert len(warnings) == 2 and warnings[0] < done < warnings[1]
    assert any("first row, as the model sees it:\ns0" in text and "target    red</s>" in text for text in said)


def test_label_and_generate_read_rows_too(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(in_folder / "pairs.jsonl", pairs(4))
    reward = train("reward", in_folder / "reward", data, "trainer.max_steps=1")
    common = [f"data.input={data}", "data.max_length=128", "run.device=cpu", "dry_run=true"]
    assert run(["label", "run.dir=out", f"init.from={reward}", *common]) == 0
    shown = capsys.readouterr().out
    assert "data.input: 4, all read" in shown and "  answer     red please</s>" in shown
    policy = train("sft", in_folder / "sft", write_jsonl(in_folder / "rows.jsonl", samples(4)), "trainer.max_steps=1")
    assert run(["generate", "run.dir=out", f"init.from={policy}", *common]) == 0
    shown = capsys.readouterr().out
    assert "data.input: 4, all read" in shown and "  prompt    User:Say redAssistant:\\x20" in shown
    data.write_text("{}\n" + data.read_text())
    for stage, model in (("label", reward), ("generate", policy)):
        assert run([stage, "run.dir=out", f"init.from={model}", *common]) == 65
        assert "pairs.jsonl:1: prompt: missing" in capsys.readouterr().err


def test_a_command_builds_its_tokenizer_once(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a template that writes the date, the model is resolved again, and `model.tokenizer` is read beside it."""
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = write_hugging_face(in_folder / "tokenizer", template, pad_token=str(in_folder))
    data = write_jsonl(in_folder / "rows.jsonl", samples(4))
    model = [word for word in TINY if word != "model=demo"]
    built: list[object] = []
    usual = HuggingFaceTokenizer.__init__

    def spy(self: HuggingFaceTokenizer, files: Any) -> None:
        built.append(files)
        usual(self, files)

    monkeypatch.setattr(HuggingFaceTokenizer, "__init__", spy)
    words = [f"model.tokenizer={tokenizer}", "model.vocab_size=null", "data.template=chat", "trainer.max_steps=1"]
    train("sft", in_folder / "sft", data, *words, model=model)
    continued = [f"init.from={in_folder / 'sft'}", f"model.tokenizer={tokenizer}", "trainer.max_steps=1"]
    train("sft", in_folder / "next", data, *continued, model=[word for word in model if "model." not in word])
    # The second command finds the files of the first in its checkpoint, with the same content.
    assert len(built) == 1
