"""`data.sample` and `data.weights` in training commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from tests.training import STEPS, TINY, labelled, metrics, pairs, samples, train, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    rows = samples(40)
    write_jsonl(folder / "few.jsonl", rows[:6])
    write_jsonl(folder / "many.jsonl", rows[6:30])
    write_jsonl(folder / "spare.jsonl", rows[30:])
    return folder


def files(folder: Path, *names: str) -> Any:
    return f"[{','.join(str(folder / f'{name}.jsonl') for name in names)}]"


def sources(run_dir: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((run_dir / "manifest.json").read_text())["extra"]["data"]["sources"]
    return found


def test_a_mixed_training_continues_with_the_same_steps(folder: Path, caplog: Any) -> None:
    data = files(folder, "few", "many", "spare")
    words = ["data.sample=36", "data.weights={few: 0.5, many: 0.5}", "optim.lr_decay_style=constant"]
    whole = train("sft", folder / "whole", data, *words, "trainer.max_steps=8")
    # 36 rows of 6, 24 and 10: all that the small sources have, and 20 of the largest one.
    assert sources(whole) == {
        "few": {"rows": 6, "sampled": 6, "used": 6, "epoch": 13},
        "many": {"rows": 24, "sampled": 20, "used": 20, "epoch": 13},
        "spare": {"rows": 10, "sampled": 10, "used": 10, "epoch": 0},
    }
    assert "data.train: 36 of 40 rows: few 6, many 20 of 24, spare 10" in caplog.messages
    assert "data.weights: an epoch of 26 rows: few 13 (2.2x), many 13 (0.65x)" in caplog.messages
    assert "data.weights has no share for these sources, so they take no part: spare 10" in caplog.messages
    train("sft", folder / "cut", data, *words, "trainer.max_steps=3", "trainer.save_interval=3")
    (folder / "cut" / "manifest.json").unlink()
    cut = train("sft", folder / "cut", data, *words, "trainer.max_steps=8", "trainer.save_interval=3")
    assert metrics(cut) == metrics(whole)
    epoch = train("sft", folder / "epoch", data, *words, "trainer.max_steps=null")
    assert metrics(epoch, "consumed_samples")[-1] == 26


def test_pairs_of_labelled_rows_are_sampled_as_pairs(folder: Path) -> None:
    prompts = [{**row, "prompt": f"Name {k % 4}"} for k, row in enumerate(labelled([k / 3 for k in range(12)]))]
    data = write_jsonl(folder / "answers.jsonl", prompts)
    write_jsonl(folder / "given.jsonl", pairs(8))
    both = files(folder, "given", "answers")
    made = train("dpo", folder / "dpo", both, "method.pairs=all", "data.sample=10", "trainer.max_steps=1")
    assert data.exists()
    assert {name: count["sampled"] for name, count in sources(made).items()} == {"given": 5, "answers": 5}


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["data.weights={few: 1, mnay: 1}"], 78, "data.weights.mnay: no such source; the sources are few, many"),
        (["data.weights={few: 0}"], 78, "data.weights.few=0: must be a finite number above 0"),
        (["data.weights={few: -1}"], 78, "data.weights.few=-1: must be a finite number above 0"),
        (["data.weights={few: .inf}"], 78, "data.weights.few="),
        (["data.weights={few: nan}"], 78, "data.weights.few=nan: must be a finite number above 0"),
        (["data.weights={few: lots}"], 78, "data.weights.few=lots: must be a finite number above 0"),
        (["data.weights={few: true}"], 78, "data.weights.few=True: must be a finite number above 0"),
        (["data.weights=3"], 78, "data.weights=3"),
        (["data.weights=null"], 78, "data.weights=null"),
        (["data.sample=0"], 78, "data.sample=0: must be 1 or more"),
        (["data.sample_by=file"], 78, "data.sample_by=file: expected one of [source, row]"),
        (["data.source_column="], 78, "data.source_column: must not be empty"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: Any, words: list[str], code: int, problem: str) -> None:
    model = [word for word in TINY if word != "debug=true"]
    data = f"data.train={files(folder, 'few', 'many')}"
    assert run(["sft", f"run.dir={folder / 'never'}", data, *model, *STEPS, "dry_run=true", *words]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "data." in line]
    assert problem in line


def test_a_dry_run_counts_sources_and_the_steps_of_an_epoch(folder: Path, capsys: Any) -> None:
    def plan(*words: str) -> str:
        data = f"data.train={files(folder, 'few', 'many', 'spare')}"
        steps = ["trainer.global_batch_size=4", "trainer.max_epochs=2"]
        assert run(["sft", f"run.dir={folder / 'planned'}", data, *TINY, *steps, "dry_run=true", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "sources 40 rows: few 6, many 24, spare 10" in plan()
    assert "sources 20 rows: few 3, many 12, spare 5 (of the rows read)" in plan("data.dry_run_rows=20")
    mixed = plan("data.weights={few: 2, spare: 1}")
    assert "epoch an epoch of 16 rows: few 11 (1.8x), spare 5 (0.5x)" in mixed
    assert "warning data.weights has no share for these sources, so they take no part: many 24" in mixed
    assert "8 steps, which is 2 epochs of 16 rows" in mixed
    sampled = plan("data.sample=24", "data.dry_run_rows=12")
    assert "data.train: 24, 12 of them read" in sampled
    assert "sources 24 of 40 rows: few 6, many 9 of 24, spare 9 of 10" in sampled
    assert "about 12 steps, which is 2 epochs of 24 rows" in sampled
