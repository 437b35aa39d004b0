"""Names of other programs are answered with ours."""

import pytest

from offline_align.__main__ import run
from offline_align.config.compose import compose
from offline_align.config.foreign_names import FOREIGN, normal
from offline_align.config.reference import schema_keys
from offline_align.config.runs import GenerateRun, LabelRun, TrainRun
from offline_align.stages.registry import STAGES

OWN = {key.name for stage in STAGES.values() for key in schema_keys(stage.schema)}


@pytest.mark.parametrize("name", FOREIGN)
def test_every_answer_is_a_key_and_every_name_is_foreign(name: str) -> None:
    assert FOREIGN[name].key in OWN
    assert name == normal(name)
    assert name != normal(FOREIGN[name].key), "it is answered without the table"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning_rate=1e-5"], "learning_rate=1e-05: unknown key; write optim.lr=1e-05"),
        (["per_device_train_batch_size=2"], "here it is trainer.micro_batch_size: rows are packed"),
        (["num_train_epochs=3"], "write trainer.max_epochs=3"),
        (["max_train_samples=3"], "write data.sample=3"),
        (["interleave_probs=0.5"], "here it is data.weights: a mapping of sources to shares"),
        (["max_seq_length=512"], "write data.max_length=512"),
        (["trainer.warmup_steps=10"], "write optim.lr_warmup_steps=10"),
        (["gradient_accumulation_steps=8"], "trainer.global_batch_size: give the rows of an optimizer step"),
        (["bf16=true"], "here it is trainer.precision: bf16 or fp32"),
        (["seed=3"], "did you mean run.seed?"),
        (["max_steps=3"], "did you mean trainer.max_steps?"),
        (["--learning-rate", "1e-5"], "--learning-rate 1e-5: arguments are key=value, without dashes; write optim.lr"),
        (["--tensor-model-parallel-size", "2"], "did you mean parallel.tensor_model_parallel_size?"),
        (["--model_name_or_path=gpt2"], "write init.from=gpt2"),
        (["--lr", "1e-5"], "did you mean optim.lr?"),
        (["--optim.lr=1e-5"], "--optim.lr=1e-5: arguments have no dashes; write optim.lr=1e-5"),
        (
            ["--bf16", "--max_steps", "3"],
            "--bf16: arguments are key=value, without dashes; here it is trainer",
        ),
        (["model=models/base"], "weights are named by init.from=models/base"),
        (["--frobnicate", "3"], "--frobnicate 3: arguments are key=value, without dashes"),
    ],
)
def test_a_foreign_name_is_answered(words: list[str], said: str) -> None:
    problems = compose("sft", TrainRun, ["run.dir=out", *words]).problems
    assert any(said in problem for problem in problems), problems


def test_a_key_that_the_stage_lacks_is_named_as_such() -> None:
    (problem,) = compose("label", LabelRun, ["run.dir=out", "learning_rate=1"]).problems
    assert problem.endswith("it is optim.lr here, which `label` does not have")
    (problem,) = compose("generate", GenerateRun, ["run.dir=out", "max_tokens=5"]).problems
    assert problem.endswith("write generate.max_new_tokens=5")


def test_a_setting_under_another_name_is_not_reported_as_missing_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "model=demo", "--output_dir", "out", "train_file=rows.jsonl"]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert "write run.dir=out" in lines[0] and "write data.train=rows.jsonl" in lines[1]
