"""The whole pipeline on a few rows: each command reads the output of earlier ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.data.tokenizer import load_tokenizer
from tests.random_llama import save_random_llama
from tests.small_tokenizers import write_hugging_face
from tests.support import REPOSITORY
from tests.training import TINY, pairs, samples, write_jsonl
from tests.unit.test_documentation import commands as commands_of

SHORT = ["trainer.global_batch_size=8", "trainer.max_steps=3", "optim.lr=1e-2", "data.max_length=128"]
CPU = ["run.device=cpu", "debug=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


def commands(runs: Path) -> list[list[str]]:
    """Return the commands of scripts/pipeline.sh at a small scale."""
    prepare, label = runs / "prepare", runs / "label"
    policy = [f"init.from={runs / 'sft'}", *SHORT, *CPU]
    labelled = f"data.train={label / 'labelled.jsonl'}"
    both = f"data.input=[{prepare / 'sft_train.jsonl'},{prepare / 'preferences_train.jsonl'}]"
    sizes = ["prepare.demo_sft_rows=60", "prepare.demo_preference_rows=60", "prepare.demo_prompt_rows=6"]
    steps = [
        ["prepare", f"run.dir={prepare}", "data.input=demo", *sizes],
        ["sft", f"run.dir={runs / 'sft'}", f"data.train={prepare / 'sft_train.jsonl'}", *TINY, *SHORT],
        ["reward", f"run.dir={runs / 'reward'}", f"data.train={prepare / 'preferences_train.jsonl'}", *policy],
        ["label", f"run.dir={label}", f"init.from={runs / 'reward'}", both, "data.max_length=128", *CPU],
        ["fa", f"run.dir={runs / 'fa'}", labelled, *policy],
        ["rwr", f"run.dir={runs / 'rwr'}", labelled, *policy],
        ["ca", f"run.dir={runs / 'ca'}", labelled, "method.target_reward=1.0", *policy],
    ]
    answer = [f"data.input={prepare / 'prompts.jsonl'}", "data.max_length=128", "generate.max_new_tokens=8", *CPU]
    for name in ("sft", "fa", "rwr", "ca"):
        steps.append(["generate", f"run.dir={runs / f'generate_{name}'}", f"init.from={runs / name}", *answer])
    low = ["method.target_reward=-1.0", f"run.dir={runs / 'generate_low'}", f"init.from={runs / 'ca'}", *answer]
    files = [str(runs / f"generate_{n}" / "generations.jsonl") for n in ("sft", "fa", "rwr", "ca", "low")]
    judge = [f"judge.model={runs / 'reward'}", f"data.input=[{','.join(files)}]", "evaluate.bootstrap_samples=50"]
    return [
        *steps,
        ["generate", *low],
        ["evaluate", f"run.dir={runs / 'evaluate'}", *judge, "data.max_length=128", *CPU],
    ]


def test_every_command_reads_the_output_of_earlier_ones(runs: Path) -> None:
    for words in commands(runs):
        assert run(words) == 0, words
    report = json.loads((runs / "evaluate" / "report.json").read_text())
    assert report["methods"] == ["sft", "fa", "rwr", "ca(1.0)", "ca(-1.0)"]
    for name in ("report.md", "report.html"):
        assert (runs / "evaluate" / name).stat().st_size > 500
    rows = [json.loads(line) for line in (runs / "generate_ca" / "generations.jsonl").read_text().splitlines()]
    prompts = [json.loads(line) for line in (runs / "prepare" / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [prompt["id"] for prompt in prompts]
    assert {row["condition"] for row in rows} == {"<rm_score>1.0"}


def test_running_again_does_nothing(runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/manifest.json")}
    assert len(before) == 13
    for words in commands(runs):
        assert run(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_chain_reaches_back_to_the_first_file(runs: Path, capsys: Any) -> None:
    assert run(["verify", f"run.dir={runs / 'evaluate'}"]) == 0
    printed = capsys.readouterr().out
    for stage in ("prepare", "sft", "reward", "label", "fa", "rwr", "ca", "generate", "evaluate"):
        assert stage in printed
    labelled = runs / "label" / "labelled.jsonl"
    content = labelled.read_text()
    labelled.write_text(content.replace("demo", "Demo", 1))
    try:
        assert run(["verify", f"run.dir={runs / 'generate_rwr'}"]) == 74
    finally:
        labelled.write_text(content)


def test_the_card_tells_settings_reward_model_and_evaluation(runs: Path, capsys: Any) -> None:
    words = ["convert", f"init.from={runs / 'ca'}", f"convert.evaluation={runs / 'evaluate'}", *CPU]
    assert run([*words, f"run.dir={runs / 'aligned'}", "convert.check=true"]) == 0
    card = (runs / "aligned" / "README.md").read_text()
    for text in (
        "| optim.lr | 0.01 |",
        "| method.target_reward | 1 |",
        "| **ca(1.0)** |",
        "| **ca(-1.0)** |",
        "| fa |",
    ):
        assert text in card, text
    assert "| raw rewards | " in card
    assert "Judged by reward model on 6 prompts" in card
    assert run(["verify", f"run.dir={runs / 'aligned'}"]) == 0
    # The table does not list another policy, and a folder without a comparison has no table.
    capsys.readouterr()
    other = ["convert", f"init.from={runs / 'reward'}", f"run.dir={runs / 'other'}", *CPU]
    assert run([*other, f"convert.evaluation={runs / 'evaluate'}"]) == 78
    assert "compares no answers" in capsys.readouterr().err
    assert run([*other, f"convert.evaluation={runs / 'label'}"]) == 78


def test_samples_of_a_policy_are_labelled_and_the_best_kept(runs: Path) -> None:
    words = [f"data.input={runs / 'prepare' / 'prompts.jsonl'}", "data.max_length=128", "generate.max_new_tokens=8"]
    sampled = runs / "sampled"
    asked = ["generate.n=3", "generate.temperature=1.0", f"init.from={runs / 'sft'}"]
    assert run(["generate", f"run.dir={sampled}", *words, *asked, *CPU]) == 0
    label = runs / "label_samples"
    rows = f"data.input={sampled / 'generations.jsonl'}"
    source = [f"init.from={runs / 'reward'}", "data.max_length=128", "data.on_bad_row=skip"]
    assert run(["label", f"run.dir={label}", rows, *source, *CPU]) == 0
    labelled = [json.loads(line) for line in (label / "labelled.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in labelled}) == len(labelled) > 6
    assert {row["id"] for row in labelled} <= {f"{row['source_id']}/{k}" for row in labelled for k in range(3)}
    best = [f"data.train={label / 'labelled.jsonl'}", "method.threshold=-100", "method.best_of=1"]
    assert run(["fa", f"run.dir={runs / 'best'}", f"init.from={runs / 'sft'}", *best, *SHORT, *CPU]) == 0
    facts = json.loads((runs / "best" / "manifest.json").read_text())["extra"]["data"]
    assert facts["kept"] == len({row["source_id"] for row in labelled})


def test_a_plan_needs_no_model(runs: Path, capsys: Any) -> None:
    # The target is beyond all of these rewards, as is often the case for the paper's 5.0.
    assert run(["plan", f"data.input={runs / 'label' / 'labelled.jsonl'}", "method.target_reward=9.5"]) == 0
    assert "outside the rewards of the data" in " ".join(capsys.readouterr().out.split())


def test_the_tutorial_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the tutorial in order, with a tiny model, few rows and one rank."""
    monkeypatch.chdir(tmp_path)
    model = write_hugging_face(tmp_path / "models" / "SmolLM2-135M")
    save_random_llama(model, load_tokenizer(model))
    (tmp_path / "raw").mkdir()
    rows = {"instructions": samples(24), "comparisons": pairs(12), "questions": samples(2)}
    for name, made in rows.items():
        kept = [{k: v for k, v in row.items() if name != "questions" or k != "response"} for row in made]
        write_jsonl(tmp_path / "raw" / f"{name}.jsonl", kept)
    trained = ["trainer.max_steps=1", "trainer.global_batch_size=4", "data.max_length=128"]
    more = {
        "prepare": ["prepare.valid_fraction=0.2"],
        **dict.fromkeys(("sft", "reward", "fa", "rwr", "ca"), trained),
        "label": ["data.max_length=128"],
        "generate": ["data.max_length=128", "generate.max_new_tokens=4"],
        "evaluate": ["data.max_length=128", "evaluate.bootstrap_samples=20"],
    }
    text = (REPOSITORY / "docs" / "tutorial.md").read_text(encoding="utf-8")
    done = []
    for command in commands_of(text):
        words = [word for word in command.words if not word.startswith("launcher.nproc_per_node=")]
        on_cpu = [] if command.stage in ("prepare", "plan", "verify") else ["run.device=cpu"]
        code = run([command.stage, *words, *more.get(command.stage, []), *on_cpu])
        assert code == 0, command
        done.append(command.stage)
    assert done[-2:] == ["convert", "verify"] and len(done) > 13
    assert (tmp_path / "models" / "aligned" / "model.safetensors").is_file()
