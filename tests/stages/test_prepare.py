"""The `prepare` command: files, counts, splits, repeated runs and errors."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run as command_line
from offline_align.config.sections import OnBadRow
from offline_align.data.demo import demo_pairs, demo_samples
from offline_align.data.jsonl import BadRows
from offline_align.data.records import PreferencePair, Prompt, Sample, read_rows
from offline_align.data.sources import Source
from offline_align.data.split import first_user_message, normalised
from offline_align.errors import ConfigError, DataError
from offline_align.stages.prepare import run
from tests.runs import job
from tests.support import real_data_dir

ROW_FILES = ["sft_train.jsonl", "sft_valid.jsonl", "preferences_train.jsonl", "preferences_valid.jsonl"]
STRICT = BadRows(OnBadRow.fail, None)

Start = Callable[..., Path]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    def start(*inputs: object, words: Sequence[str] = (), name: str = "run") -> Path:
        """Run the stage with a small demo corpus and return the run folder."""
        listed = ",".join(f"'{entry}'" for entry in inputs)
        small = ["prepare.demo_sft_rows=300", "prepare.demo_preference_rows=200"]
        made = job("prepare", [*small, f"run.dir={tmp_path / name}", f"data.input=[{listed}]", *words])
        assert run(made) == 0
        return tmp_path / name

    return start


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "response": f"Answer {number}."} | more


def test_a_log_file_gets_no_empty_lines(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(write(tmp_path / "a.jsonl", sample(1)), write(tmp_path / "b.jsonl", sample(2)))
    assert capsys.readouterr().err == ""


def test_the_demo_corpus(start: Start) -> None:
    folder = start("demo")
    names = {path.name for path in folder.iterdir()}
    assert names == {*ROW_FILES, "prompts.jsonl", "report.json", "config.yaml", "manifest.json"}
    distinct = {
        kind: len({tuple(row[column].lower() for column in columns) for row in rows})
        for kind, rows, columns in (
            (Sample, demo_samples(300, 1234, 160), ("prompt", "response")),
            (PreferencePair, demo_pairs(200, 1234, 160), ("prompt", "chosen", "rejected")),
        )
    }
    for kind, count in distinct.items():
        prefix = "sft" if kind is Sample else "preferences"
        paths = [folder / f"{prefix}_{part}.jsonl" for part in ("train", "valid")]
        assert len(list(read_rows(paths, kind, STRICT))) == count
    assert len(list(read_rows([folder / "prompts.jsonl"], Prompt, STRICT))) == 160
    report = json.loads((folder / "report.json").read_text())
    assert report["files"]["sft_train.jsonl"]["rows"] == len(load(folder / "sft_train.jsonl"))
    assert report["inputs"][0]["rows_read"] == 500
    assert report["inputs"][0]["rows_kept"] + sum(report["inputs"][0]["dropped"].values()) == 500


def test_no_prompt_is_in_both_splits_or_held_out(start: Start) -> None:
    folder = start("demo", words=["prepare.valid_fraction=0.5"])
    rows = {name: [normalised(first_user_message(r)) for r in load(folder / name)] for name in ROW_FILES}
    train = {*rows["sft_train.jsonl"], *rows["preferences_train.jsonl"]}
    valid = {*rows["sft_valid.jsonl"], *rows["preferences_valid.jsonl"]}
    assert train
    assert valid
    assert not train & valid
    assert not (train | valid) & {normalised(row["prompt"]) for row in load(folder / "prompts.jsonl")}


def test_several_formats_at_once(start: Start, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", sample(1, id="a", note="kept", source="mine"), sample(2), sample(1, id="b"))
    hh = {f"{side}": f"\n\nHuman: Hi\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    pairs = write(tmp_path / "pairs.jsonl", hh, hh | {"rejected": hh["chosen"]})
    folder = start(own, pairs, words=["prepare.valid_fraction=0.0"])
    assert load(folder / "sft_train.jsonl") == [
        sample(1, id="a", note="kept", source="mine"),
        {"id": "own.jsonl:2", **sample(2, source="own")},
    ]
    [pair] = load(folder / "preferences_train.jsonl")
    assert (pair["id"], pair["chosen"], pair["source"]) == ("pairs.jsonl:1", "chosen", "hh")
    assert (folder / "sft_valid.jsonl").read_bytes() == b""
    assert (folder / "preferences_valid.jsonl").read_bytes() == b""
    report = json.loads((folder / "report.json").read_text())
    assert report["duplicates"] == 1
    assert report["files"]["sft_train.jsonl"]["sources"] == {"mine": 1, "own": 1}
    assert report["inputs"][1] == {
        "name": "pairs.jsonl",
        "forms": {"hh": 2},
        "rows_read": 2,
        "rows_used": 2,
        "rows_made": 2,
        "rows_kept": 1,
        "bad_rows": 0,
        "dropped": {"rejected: the same as chosen": 1},
    }
    assert report["files"]["sft_train.jsonl"]["characters"]["response"]["max"] == len("Answer 1.")


def test_bad_rows_stop_the_run_or_are_quarantined(start: Start, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", sample(1, id="a"), {"prompt": "x"}, sample(3, id="a"), sample(4))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: columns: no known form"):
        start(path)
    assert not (tmp_path / "run" / "manifest.json").exists()
    folder = start(path, words=["data.on_bad_row=skip"])
    kept = [row["id"] for name in ROW_FILES for row in load(folder / name)]
    assert sorted(kept) == ["a", "rows.jsonl:4"]
    quarantine = load(folder / "quarantine.jsonl")
    assert [(row["line"], row["reason"].partition(";")[0]) for row in quarantine] == [
        (2, "columns: no known form"),
        (3, "id: duplicate id, with other content"),
    ]
    assert sum(json.loads((folder / "report.json").read_text())["bad_rows"].values()) == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "quarantine.jsonl" in {output["path"] for output in manifest["outputs"]}


def test_dropped_rows_are_reported_once(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", sample(1), {"prompt": "x"}, sample(1, id="again"), sample(2))
    start(path, words=["data.on_bad_row=skip", "prepare.valid_fraction=1e-9"])
    found, bad, dropped, split = (record.message for record in caplog.records)
    assert found == "rows.jsonl: 3 rows of the form sft: 3 SFT rows; read prompt, response, id"
    assert bad.startswith("1 bad row is left out, see ") and "quarantine.jsonl" in bad
    assert dropped == "1 row is dropped, see report.json: {'duplicate of an earlier row': 1}"
    assert split == "sft_valid.jsonl is empty: 2 rows are too few for prepare.valid_fraction=1e-09"


def test_ids_that_are_numbers_or_null(start: Start, tmp_path: Path) -> None:
    dolly = {"instruction": "Name a prime.", "context": "", "response": "2"}
    rows = [sample(1, id=1), sample(2, id=None), sample(3, id=None), dolly | {"id": 7}]
    folder = start(write(tmp_path / "rows.jsonl", *rows), words=["prepare.valid_fraction=0.0"])
    ids = [row["id"] for row in load(folder / "sft_train.jsonl")]
    assert ids == ["1", "rows.jsonl:2", "rows.jsonl:3", "7"]


def test_no_usable_row_is_bad_data(start: Start, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty\.jsonl: no usable row"):
        start(write(tmp_path / "empty.jsonl"))


def test_a_finished_run_is_not_repeated(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    folder = start("demo")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    start("demo")
    assert f"prepare: {folder} is complete" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="other settings or inputs"):
        start("demo", words=["run.seed=7"])


def test_an_interrupted_run_starts_again(start: Start) -> None:
    folder = start("demo")
    whole = {name: (folder / name).read_bytes() for name in ROW_FILES}
    (folder / "manifest.json").unlink()
    (folder / "sft_train.jsonl").write_bytes(whole["sft_train.jsonl"][:100])
    (folder / "quarantine.jsonl").write_text("left by the attempt before")
    start("demo")
    assert {name: (folder / name).read_bytes() for name in ROW_FILES} == whole
    assert not (folder / "quarantine.jsonl").exists()


def test_the_same_seed_gives_the_same_bytes(start: Start) -> None:
    first, again = start("demo", name="first"), start("demo", name="again")
    for name in [*ROW_FILES, "prompts.jsonl", "report.json"]:
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_a_dry_run_writes_nothing(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, good = write(tmp_path / "rows.jsonl", {"no": "row"}), write(tmp_path / "good.jsonl", sample(1, rating=2))
    folder = start(path, good, "demo", words=["dry_run=true"])
    assert not folder.exists()
    out = capsys.readouterr().out
    assert f"{path}, 14 bytes: 1: columns: no known form; the row has no;" in out
    assert "bytes: the first row has the form sft and becomes 1 labelled row" in out
    assert all(name in out for name in [str(path), *ROW_FILES, "prompts.jsonl", "report.json"])
    assert "tokenizer.model" not in out


def test_a_tokenizer_is_trained_on_the_training_rows(start: Start) -> None:
    from offline_align.data.tokenizer import load_tokenizer

    words = ["tokenizer.train=true", "tokenizer.vocab_size=600"]
    tokenizer = load_tokenizer(start("demo", words=words))
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode("The lion is yellow.")) <= 8


def test_all_wrong_settings_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "prepare.format=pickled",
        "prepare.valid_fraction=1.0",
        "prepare.max_rows=0",
        "prepare.demo_prompt_rows=1000000000",
        "prepare.demo_sft_rows=-1",
        "dry_run=true",
        "data.input=missing.jsonl",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert command_line(["prepare", *words]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.removeprefix("offline-align: error: ").partition("=")[0] for line in lines) == [
        "data.input",
        "prepare.demo_prompt_rows",
        "prepare.demo_sft_rows",
        "prepare.format",
        "prepare.max_rows",
        "prepare.valid_fraction",
    ]


def rated(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"Name {i // 2}", "response": f"word {i}", "rating": i % 5, "note": i} for i in range(count)]


def test_own_scores_become_what_label_writes(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing: list[dict[str, Any]] = [
        {"prompt": "Name a", "response": "x", "rating": None},
        {"prompt": "Name b", "response": "y"},
    ]
    path = write(tmp_path / "rows.jsonl", *rated(), *missing, {"prompt": "q", "chosen": "a", "rejected": "b"})
    folder = start(path, words=["prepare.score_column=rating", "prepare.valid_fraction=0.3"])
    train, valid = load(folder / "labelled.jsonl"), load(folder / "labelled_valid.jsonl")
    assert len(train) + len(valid) == 40 and len(valid) > 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    raw = [row["reward_raw"] for row in train]
    mean = sum(raw) / len(raw)
    std = (sum((x - mean) ** 2 for x in raw) / len(raw)) ** 0.5
    stats = json.loads((folder / "reward_stats.json").read_text())
    assert (stats["mean"], stats["std"], stats["count"]) == (pytest.approx(mean), pytest.approx(std), len(train))
    for row in (*train, *valid):
        assert row["reward_raw"] == row["rating"] == row["note"] % 5 and row["source_id"] == row["id"]
        assert row["reward"] == pytest.approx((row["rating"] - mean) / std)
    assert (folder / "reward_histogram.png").read_bytes().startswith(b"\x89PNG")
    assert [len(load(folder / name)) for name in ROW_FILES] in ([0, 0, 1, 0], [0, 0, 0, 1])
    assert json.loads((folder / "report.json").read_text())["inputs"][0]["dropped"] == {"an answer without a score": 2}
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {output["path"] for output in manifest["outputs"]}
    assert {"labelled.jsonl", "labelled_valid.jsonl", "reward_stats.json", "reward_histogram.png"} <= names
    assert manifest["extra"]["statistics"] == stats
    assert command_line(["plan", f"data.input={folder / 'labelled.jsonl'}", f"run.dir={tmp_path / 'plan'}"]) == 0
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["rows"] == len(train)
    capsys.readouterr()
    assert command_line(["verify", f"run.dir={tmp_path / 'plan'}"]) == 0
    assert "rows.jsonl" in capsys.readouterr().out


def test_methods_learn_from_own_scores(start: Start, tmp_path: Path) -> None:
    from tests.training import train

    folder = start(write(tmp_path / "rows.jsonl", *rated()), words=["prepare.valid_fraction=0.3"])
    valid = f"data.valid={folder / 'labelled_valid.jsonl'}"
    for method in ("fa", "ca"):
        made = train(method, tmp_path / method, folder / "labelled.jsonl", valid)
        metrics = load(made / "metrics.jsonl")
        assert any("valid_nll" in line for line in metrics)


def test_only_validation_rows_are_no_scale(start: Start, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 40 rated answers are validation rows; lower prepare\.valid_fraction"):
        start(write(tmp_path / "rows.jsonl", *rated()), words=["prepare.valid_fraction=0.999999999"])


@pytest.mark.parametrize(
    ("words", "rewards"),
    [
        (["prepare.score_column={x: 2, y: 0.5}"], [4.0]),
        (["prepare.score_column.x=2"], [2.0]),
        (["--config", "CONFIG"], [5.0]),
    ],
)
def test_weights_of_scores_on_the_command_line_and_in_a_file(
    start: Start, tmp_path: Path, words: list[str], rewards: list[float]
) -> None:
    config = tmp_path / "own.yaml"
    config.write_text("prepare:\n  score_column: {x: 1, y: 1}\n  columns: {prompt: question}\n")
    path = write(tmp_path / "rows.jsonl", {"question": "q", "response": "a", "x": 1, "y": 4})
    given = [word.replace("CONFIG", str(config)) for word in words]
    named = [] if "CONFIG" in words else ["prepare.columns={prompt: question}"]
    folder = start(path, words=[*given, *named, "prepare.valid_fraction=0"])
    assert [row["reward_raw"] for row in load(folder / "labelled.jsonl")] == rewards


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("prepare.columns={promt: question}", "prepare.columns.promt: .* did you mean prompt"),
        ("prepare.columns={prompt: 3}", "prepare.columns.prompt=3: must be the name of a column"),
        ("prepare.score_column={x: a}", "prepare.score_column=.*: must be a column, or a mapping"),
        ("prepare.score_column=[x]", "prepare.score_column=.*: must be a column, or a mapping"),
        ("prepare.score_column=x prepare.rated=ignore", "prepare.rated=ignore: contradicts prepare.score_column=x"),
        ("prepare.text_prompt=' '", "prepare.text_prompt: must not be empty"),
    ],
)
def test_wrong_settings_of_columns_are_named(
    tmp_path: Path, word: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = word.split(" prepare.rated", 1)
    more = [f"prepare.rated{words[1]}"] if len(words) > 1 else []
    path = write(tmp_path / "rows.jsonl", sample(1))
    assert command_line(["prepare", f"run.dir={tmp_path / 'run'}", f"data.input={path}", words[0], *more]) == 78
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(problem, line)


def test_rows_from_the_hub(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that nothing looks for the network
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([sample(i) for i in range(9)]))
    folder = start("hf:owner/set", words=["prepare.max_rows=4"])
    rows = [row for name in ROW_FILES for row in load(folder / name)]
    assert sorted(row["id"] for row in rows) == [f"{Source('hf:owner/set', None).name}:{i}" for i in range(1, 5)]
    assert "sft_train.jsonl" in capsys.readouterr().out


def test_real_rows_pass_unchanged(start: Start) -> None:
    data = real_data_dir()
    inputs = [data / name for name in ROW_FILES]
    folder = start(*inputs)
    before = {row["id"]: row for path in inputs for row in load(path)}
    after = {row["id"]: row for name in ROW_FILES for row in load(folder / name)}
    assert after == before
