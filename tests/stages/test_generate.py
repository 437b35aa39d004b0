"""The `generate` command: answers, ranks, interruptions and errors."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_align import lineage
from offline_align.__main__ import run
from offline_align.config.sections import Template
from offline_align.data.prefix import After
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from tests.preloaded import python
from tests.random_llama import save_random_llama
from tests.small_tokenizers import write_sentencepiece

CONDITION = {"reward_format": "<rm_score>{reward:.1f}", "reward_limit": 9.9, "target_reward": 5.0}
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random policy in Hugging Face format, with the metadata of our exporter."""

    def save(method: str, condition: dict[str, Any] | None) -> Path:
        folder = tmp_path_factory.mktemp(method)
        tokenizer = load_tokenizer(write_sentencepiece(folder))
        described = {"method": method, "template": "paper", "condition": condition}
        return save_random_llama(folder, tokenizer, offline_align=described)

    return save


@pytest.fixture(scope="module")
def policy(save: Callable[..., Path]) -> Path:
    return save("sft", None)


@pytest.fixture(scope="module")
def conditional(save: Callable[..., Path]) -> Path:
    return save("ca", CONDITION)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"Hello, fox {i}" + " dog" * (i % 5), "benchmark": "b"} for i in range(14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(policy: Path, prompts: Path, run_dir: Path, *more: str) -> list[str]:
    common = ["run.device=cpu", "data.max_length=128", f"generate.max_new_tokens={NEW_TOKENS}"]
    return ["generate", f"init.from={policy}", f"data.input={prompts}", f"run.dir={run_dir}", *common, *more]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    command = [python(), "-m", "offline_align", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def generate(*arguments: Any) -> None:
    """Run the stage in this process."""
    assert run(words(*arguments)) == 0


def read(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "generations.jsonl").read_text().split("\n")[:-1]]


def greedy_by_hand(policy: Path, prompt: str, condition: str = "") -> str:
    import transformers

    tokenizer = load_tokenizer(policy)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    context = Renderer(tokenizer, Template.paper).context([Message("user", prompt)], condition)
    ids = list(context)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            (first, second), (token, _) = (found.tolist() for found in model(torch.tensor([ids])).logits[0, -1].topk(2))
            # Threads, ranks and batches change logits by about 1e-6, which cannot change such a choice.
            assert first - second > 1e-4
            ids.append(token)
            if ids[-1] == tokenizer.eos_id:
                break
    return tokenizer.decode([token for token in ids[len(context) :] if token != tokenizer.eos_id], After.text)


@pytest.mark.distributed
def test_answers_are_greedy_and_the_same_on_any_number_of_ranks(
    policy: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "offline_align")
    generate(policy, prompts, tmp_path / "one", "generate.batch_size=3")
    assert "first prompt, as the model sees it:\n" in caplog.text
    assert "  prompt    User:Hello, fox 0Assistant:\\x20\n" in caplog.text
    rows = read(tmp_path / "one")
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [{key: row[key] for key in ("id", "prompt", "benchmark")} for row in rows] == asked
    for row in rows:
        assert row["response"] == greedy_by_hand(policy, row["prompt"])
        assert row["condition"] is None
    assert not (tmp_path / "one" / "journal").exists()
    manifest = lineage.read_manifest(tmp_path / "one")
    assert manifest is not None
    assert manifest.extra["method"] == "sft"
    assert manifest.extra["target_reward"] is None
    assert lineage.verify(tmp_path / "one").problems() == []
    # The launcher starts new processes.
    monkeypatch.setattr(sys, "executable", python())
    generate(policy, prompts, tmp_path / "two", "launcher.nproc_per_node=2")
    assert read(tmp_path / "two") == rows


def test_a_megatron_checkpoint_is_exported_once_and_answers_alike(
    conditional: Path, prompts: Path, tmp_path: Path
) -> None:
    ours = tmp_path / "ours"
    convert = [
        "convert",
        f"init.from={conditional}",
        f"run.dir={ours}",
        "convert.to=megatron",
        "run.device=cpu",
    ]
    assert run(convert) == 0
    run_dir = tmp_path / "out"
    generate(ours, prompts, run_dir)
    rows = read(run_dir)
    assert {row["condition"] for row in rows} == {"<rm_score>5.0"}
    for row in rows[:3]:
        assert row["response"] == greedy_by_hand(conditional, row["prompt"], "<rm_score>5.0")
    (exported,) = (run_dir / "huggingface").iterdir()
    generate(exported, prompts, tmp_path / "again", "method.target_reward=-2.5")
    assert {row["condition"] for row in read(tmp_path / "again")} == {"<rm_score>-2.5"}
    manifest = lineage.read_manifest(tmp_path / "again")
    assert manifest is not None
    assert manifest.extra["target_reward"] == -2.5
    assert manifest.extra["condition"] == CONDITION | {"target_reward": -2.5}


def test_several_samples_are_numbered(policy: Path, prompts: Path, tmp_path: Path) -> None:
    sampling = ["generate.n=3", "generate.temperature=1.0"]
    generate(policy, prompts, tmp_path / "out", *sampling)
    rows = read(tmp_path / "out")
    assert [(row["id"], row["sample_index"]) for row in rows] == [(f"q{i}", k) for i in range(14) for k in range(3)]
    assert len({row["response"] for row in rows[:3]}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_continues_where_it_stopped(
    policy: Path, prompts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    lines = prompts.read_text().splitlines()
    prompts.write_text("".join(line.replace("q", f"q{i}-") + "\n" for i in range(8) for line in lines))
    run_dir = tmp_path / "out"
    arguments = words(policy, prompts, run_dir, "generate.batch_size=1")
    process = start(arguments)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in run_dir.glob("journal/*/*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == (75 if number is signal.SIGTERM else -number)
    assert not (run_dir / "generations.jsonl").exists()
    (journal,) = run_dir.glob("journal/*/*.jsonl")
    before = journal.read_bytes()
    done = before.count(b"\n")
    assert 0 < done < 112
    process = start(arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"generating: all {112 - done} answers" in errors
    assert [row["id"] for row in read(run_dir)] == [f"q{i}-{k}" for i in range(8) for k in range(14)]


@pytest.mark.parametrize(
    ("model", "more", "named"),
    [
        ("policy", ["method.target_reward=3"], "method.target_reward=3"),
        ("conditional", ["method.target_reward=99"], "method.target_reward=99"),
        ("policy", ["generate.n=2"], "generate.n=2"),
        ("policy", ["generate.engine=vllm"], "generate.engine=vllm"),
        ("policy", ["parallel.tensor_model_parallel_size=2"], "parallel.tensor_model_parallel_size=2"),
    ],
)
def test_wrong_settings_are_named_before_anything_starts(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    prompts: Path,
    tmp_path: Path,
    model: str,
    more: list[str],
    named: str,
) -> None:
    folder: Path = request.getfixturevalue(model)
    assert run(words(folder, prompts, tmp_path / "out", *more)) == 78
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conditional_policy_without_any_target_is_refused(
    save: Callable[..., Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("ca", None)
    assert run(words(folder, prompts, tmp_path / "out")) == 78
    assert "method.target_reward is not set" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    conditional: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words(conditional, prompts, tmp_path / "out", "dry_run=true")) == 0
    shown = capsys.readouterr().out
    assert "<rm_score>5.0" in shown
    assert "greedy" in shown
    assert not (tmp_path / "out").exists()


def test_every_prompt_is_answered_for_each_target(conditional: Path, prompts: Path, tmp_path: Path) -> None:
    generate(conditional, prompts, tmp_path / "sweep", "method.target_reward=[-1.0,5.0]")
    rows = read(tmp_path / "sweep")
    assert [row["condition"] for row in rows[:4]] == ["<rm_score>-1.0", "<rm_score>5.0"] * 2
    generate(conditional, prompts, tmp_path / "one", "method.target_reward=-1.0")
    assert [row["response"] for row in rows[::2]] == [row["response"] for row in read(tmp_path / "one")]
    manifest = lineage.read_manifest(tmp_path / "sweep")
    assert manifest is not None
    assert manifest.extra["targets"] == {"<rm_score>-1.0": -1.0, "<rm_score>5.0": 5.0}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("[1.0,1.01]", "gives the same text '<rm_score>1.0' as 1.0"),
        ("[]", "a list of them"),
        ("[1.0,high]", "a list of them"),
    ],
)
def test_targets_with_the_same_condition_text_are_refused(
    conditional: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, complaint: str
) -> None:
    assert run(words(conditional, prompts, tmp_path / "r", f"method.target_reward={given}")) == 78
    assert complaint in capsys.readouterr().err
