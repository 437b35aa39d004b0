"""Mistakes in settings: exit 78 in seconds, with one line each that names key, value and fix."""

import json
import time
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.training import samples, write_jsonl

TRAIN = ["sft", "model=demo", "run.device=cpu"]

# Words to add to a valid command line, and the text that the error line must contain besides the key.
TYPOS = [
    ("optim.lrr=1e-5", "did you mean optim.lr?"),
    ("optim.learning_rate=1e-5", "unknown key"),
    ("lr=1e-5", "did you mean optim.lr?"),
    ("trainer.max_step=3", "did you mean trainer.max_steps?"),
    ("trainer.maxsteps=3", "did you mean trainer.max_steps?"),
    ("trainer.global_batchsize=8", "did you mean trainer.global_batch_size?"),
    ("trainer.micro_batch=8", "did you mean trainer.micro_batch_size?"),
    ("trainer.save_intervall=8", "did you mean trainer.save_interval?"),
    ("data.maxlength=8", "did you mean data.max_length?"),
    ("data.onbadrow=skip", "did you mean data.on_bad_row?"),
    ("parallel.tensor_parallel_size=2", "write parallel.tensor_model_parallel_size=2"),
    ("parallel.sequence_paralel=true", "did you mean parallel.sequence_parallel?"),
    ("run.sed=3", "did you mean run.seed?"),
    ("init.form=x", "did you mean init.from?"),
    ("model.num_layer=2", "did you mean model.num_layers?"),
    ("launcher.nproc=2", "unknown key"),
    ("nproc_per_node=2", "did you mean launcher.nproc_per_node?"),
    ("method.beta=5", "unknown key"),
    ("generate.n=5", "unknown key"),
    ("model=dmo", "did you mean demo?"),
    ("parallel=tp44", "did you mean tp4?"),
    ("mdel=demo", "unknown key"),
]
TYPES = [
    ("optim.lr=fast", "expected a number"),
    ("optim.lr=[1]", ""),
    ("optim.lr=null", "null is not allowed"),
    ("trainer.max_steps=1.5", "expected a whole number"),
    ("trainer.max_steps=many", "expected a whole number"),
    ("trainer.precision=fp16", "expected one of"),
    ("data.too_long=cut", "expected one of"),
    ("data.on_bad_row=ignore", "expected one of"),
    ("data.template=chatml", "expected one of"),
    ("run.device=tpu", "expected one of"),
    ("optim.lr_decay_style=exponential", "expected one of"),
    ("parallel.sequence_parallel=1", "expected true or false"),
    ("parallel.sequence_parallel=yes", "expected true or false"),
    ("run.seed=abc", "expected a whole number"),
    ("trainer.max_time=[1]", ""),
    ("data.train={a:1}", "needs a path"),
    ("data.train=[a", "cannot be read"),
    ("~optim.lr", "only key=value"),
    ("optim.lr=1,2", "only key=value"),
    ("dry_run=maybe", "expected true or false"),
]
RANGES = [
    ("optim.lr=0", "must be above 0"),
    ("optim.lr=-1", "must be above 0"),
    ("optim.lr=nan", "finite"),
    ("optim.lr=inf", "finite"),
    ("optim.min_lr=1", "must not exceed"),
    ("optim.weight_decay=-0.1", "0 or more"),
    ("optim.clip_grad=nan", "finite"),
    ("optim.adam_beta1=1", "below 1"),
    ("optim.adam_beta2=-0.1", "at least 0"),
    ("optim.lr_warmup_steps=-1", "0 or more"),
    ("trainer.max_steps=0", "1 or more"),
    ("trainer.max_epochs=0", "1 or more"),
    ("trainer.global_batch_size=0", "1 or more"),
    ("trainer.micro_batch_size=0", "1 or more"),
    ("trainer.save_interval=0", "1 or more"),
    ("trainer.keep_checkpoints=0", ""),
    ("trainer.max_time=soon", "not a duration"),
    ("trainer.max_time=0", "above 0"),
    ("data.max_length=1", "at least 2"),
    ("data.max_length=100000", "positions"),
    ("run.seed=-1", "between 0 and"),
    ("run.seed=9999999999", "between 0 and"),
    ("model.num_layers=0", "1 or more"),
    ("launcher.nproc_per_node=0", "1 or more"),
    ("parallel.tensor_model_parallel_size=0", "1 or more"),
]
CLASHES = [
    ("parallel.sequence_parallel=true", "but there is 1"),
    ("parallel.tensor_model_parallel_size=2", "1 rank cannot be divided"),
    ("parallel.context_parallel_size=2", "1 rank cannot be divided into groups of 2"),
    ("trainer.global_batch_size=7 trainer.micro_batch_size=2", "use a multiple of 2"),
    ("launcher.nproc_per_node=2 trainer.global_batch_size=3", "use a multiple of 2"),
    ("launcher.nproc_per_node=8 parallel.tensor_model_parallel_size=8", "does not divide model.num_attention_heads"),
    ("model.hidden_size=102", "model.num_attention_heads"),
    ("model.num_query_groups=5", "model.num_query_groups=5"),
    ("model.vocab_size=10", "entries"),
    ("model.backend=transformer_engine", "model.backend=transformer_engine: "),
    ("launcher=slurm launcher.attempts=0", "1 or more"),
    ("launcher=slurm launcher.time=4", "write 3h50m"),
    ("launcher=slurm launcher.dependency=first", "12:13"),
    ("launcher=slurm launcher.signal_margin_seconds=-1", "0 or more"),
    ("launcher=slurm launcher.environment.a-b=1", "environment variable"),
    ("launcher=slurm launcher.sbatch.Q=1", "option"),
    ("launcher.nodes=2", "torchrun"),
    ("data.train=nowhere.jsonl", "no such file"),
    ("init.from=nowhere", "no such folder"),
    ("model.tokenizer=nowhere.model", "no such file"),
    ("data.template=chat", "no chat template"),
    ("--config=nowhere.yaml", "no such path"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("mistakes") / "rows.jsonl", samples(4))


@pytest.mark.parametrize(("mistake", "said"), [*TYPOS, *TYPES, *RANGES, *CLASHES])
def test_a_mistake_is_named(
    mistake: str, said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    base = [f"data.train={rows}"] if not mistake.startswith("data.train") else []
    small = ["trainer.global_batch_size=4"] if "global_batch_size" not in mistake else []
    words = [*TRAIN, f"run.dir={tmp_path / 'out'}", *base, *small, *mistake.split(" ")]
    assert run(words) == 78
    assert time.monotonic() - started < 10
    lines = capsys.readouterr().err.splitlines()
    key = mistake.split(" ")[-1].partition("=")[0].lstrip("~")
    assert any(key in line and said in line for line in lines), lines
    assert all(line.startswith("offline-align: error: ") for line in lines), lines
    assert not (tmp_path / "out").exists()


OTHERS = [
    ("fa", "method.threshold=inf", "method.threshold"),
    ("rwr", "method.beta=0", "method.beta"),
    ("rwr", "method.beta=nan", "method.beta"),
    ("ca", "method.reward_limit=0", "method.reward_limit"),
    ("ca", "method.reward_format=score", "method.reward_format"),
    ("ca", "method.target_reward=nan", "method.target_reward"),
    ("label", "label.flush_rows=0", "label.flush_rows"),
    ("label", "optim.lr=1", "unknown key"),
    ("generate", "generate.temperature=-1", "generate.temperature"),
    ("generate", "generate.top_p=2", "generate.top_p"),
    ("generate", "generate.n=3", "greedy"),
    ("generate", "generate.engine=tgi", "expected one of"),
    ("prepare", "prepare.valid_fraction=1", "prepare.valid_fraction"),
    ("prepare", "prepare.format=pickled", "prepare.format"),
    ("prepare", "trainer.max_time=later", "trainer.max_time"),
    ("prepare", "tokenizer.vocab_size=10", "tokenizer.vocab_size"),
    ("convert", "convert.to=onnx", "expected one of"),
    ("evaluate", "evaluate.confidence=95", "evaluate.confidence"),
    ("evaluate", "judge=oracle", "judge"),
    ("plan", "method.beta=-1", "method.beta"),
    ("verify", "run.dir=nowhere", "no such folder"),
    ("sfft", "run.dir=x", "no such stage"),
]


@pytest.mark.parametrize(("stage", "mistake", "said"), OTHERS)
def test_mistakes_of_other_stages(
    stage: str, mistake: str, said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"run.dir={tmp_path / 'out'}"] if "run.dir" not in mistake else []
    needs_input = stage in ("prepare", "label", "generate", "evaluate", "plan")
    given += [f"data.input={rows}"] if needs_input else []
    assert run([stage, *given, mistake]) == 78
    assert any(said in line for line in capsys.readouterr().err.splitlines())
    assert not (tmp_path / "out").exists()


def test_there_are_sixty_distinct_cases_or_more() -> None:
    cases = [*TYPOS, *TYPES, *RANGES, *CLASHES, *OTHERS]
    assert len(set(map(json.dumps, cases))) == len(cases) >= 60
