"""The `label` command: every row is scored once, with the same bytes after interruptions."""

import itertools
import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offline_align.__main__ import run
from offline_align.config.sections import ComputeSection, Device, RunSection
from offline_align.data.batch import PackedBatch
from offline_align.lineage import read_manifest
from tests.small_tokenizers import sentencepiece_model
from tests.training import continued, pairs, samples, train, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("label")


@pytest.fixture(scope="module")
def reward(folder: Path) -> Path:
    base = train("sft", folder / "base", write_jsonl(folder / "rows.jsonl", samples(40)))
    return train("reward", folder / "reward", write_jsonl(folder / "pairs.jsonl", pairs()), model=continued(base))


def label(folder: Path, name: str, reward: Path, *words: str) -> int:
    both = f"data.input=[{folder / 'rows.jsonl'},{folder / 'pairs.jsonl'}]"
    return run(
        [
            "label",
            f"run.dir={folder / name}",
            f"init.from={reward}",
            both,
            "data.max_length=128",
            "run.device=cpu",
            *words,
        ]
    )


def scores(folder: Path, name: str) -> dict[str, float]:
    lines = (folder / name / "labelled.jsonl").read_text().splitlines()
    return {row["id"]: row["reward_raw"] for row in map(json.loads, lines)}


def scores_of_all(value: float, monkeypatch: Any) -> None:
    """Make reward models give every row the same score."""
    from offline_align.model.heads import RewardModel

    monkeypatch.setattr(RewardModel, "forward", lambda self, batch: torch.full((len(batch.last_index),), value))


def test_labels_statistics_and_histogram(folder: Path, reward: Path) -> None:
    assert label(folder, "whole", reward) == 0
    rows = [json.loads(line) for line in (folder / "whole" / "labelled.jsonl").read_text().splitlines()]
    assert len(rows) == 40 + 24
    assert [row["id"] for row in rows[:40]] == [f"s{i}" for i in range(40)]
    assert rows[41]["answer"] == "rejected" and rows[41]["source_id"] == "p0"
    raw = [row["reward_raw"] for row in rows]
    mean = sum(raw) / 64
    std = (sum((x - mean) ** 2 for x in raw) / 64) ** 0.5
    stats = json.loads((folder / "whole" / "reward_stats.json").read_text())
    assert (stats["mean"], stats["std"], stats["count"]) == (pytest.approx(mean), pytest.approx(std), 64)
    assert [row["reward"] for row in rows] == pytest.approx([(x - mean) / std for x in raw])
    assert (folder / "whole" / "reward_histogram.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_is_even_and_keeps_both_answers_of_a_pair(folder: Path, reward: Path, capsys: Any) -> None:
    assert label(folder, "sampled", reward, "data.sample=12") == 0
    rows = [json.loads(line) for line in (folder / "sampled" / "labelled.jsonl").read_text().splitlines()]
    assert Counter(row["source"] for row in rows) == {"rows": 6, "pairs": 2 * 6}
    assert Counter(row["source_id"] for row in rows if row["source"] == "pairs").most_common()[-1][1] == 2
    manifest = read_manifest(folder / "sampled")
    assert manifest is not None
    expected = {"rows": {"rows": 40, "sampled": 6}, "pairs": {"rows": 12, "sampled": 6}}
    assert (manifest.extra["sources"], manifest.extra["rows"], manifest.extra["pairs"]) == (expected, 18, 6)
    assert label(folder, "sampled", reward, "data.sample=13") == 78, "the sample is part of the content key"
    capsys.readouterr()
    assert label(folder, "unused", reward, "data.sample=12", "dry_run=true") == 0
    planned = capsys.readouterr().out
    assert "12 of 52 rows: rows 6 of 40, pairs 6 of 12" in " ".join(planned.split())
    path = folder / "sampled" / "labelled.jsonl"
    assert run(["plan", f"data.input={path}", "data.sample=8", f"run.dir={folder / 'plan_sampled'}"]) == 0
    plan = json.loads((folder / "plan_sampled" / "plan.json").read_text())
    assert (plan["rows"], {name: n["sampled"] for name, n in plan["sources"].items()}) == (8, {"rows": 4, "pairs": 4})
    assert "sources: 8 of 18 rows: rows 4 of 6, pairs 4 of 12" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["trainer.micro_batch_size=4"], ["data.max_length=64"]])
def test_scores_do_not_depend_on_neighbours(folder: Path, reward: Path, words: list[str]) -> None:
    name = words[0].replace("=", "_")
    assert label(folder, "whole", reward) == 0
    assert label(folder, name, reward, *words) == 0
    assert scores(folder, name) == pytest.approx(scores(folder, "whole"), abs=1e-5)


def test_interrupted_labelling_is_the_same_to_the_byte(
    folder: Path, reward: Path, monkeypatch: Any, capsys: Any
) -> None:
    from offline_align.model.heads import RewardModel

    assert label(folder, "whole", reward) == 0
    original = RewardModel.forward
    computed = []

    def stop_at_the_second(self: RewardModel, batch: PackedBatch) -> Tensor:
        computed.append(len(batch.last_index))
        if len(computed) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "forward", stop_at_the_second)
        assert label(folder, "cut", reward) == 75
    assert f"stopped after {sum(computed)} of 64 rows" in capsys.readouterr().err
    assert sum(computed) < 64
    assert not (folder / "cut" / "labelled.jsonl").exists()
    (part,) = (folder / "cut" / "journal").glob("*/part_*.jsonl")
    assert part.read_bytes().count(b"\n") == sum(computed), "what was computed is there"
    # A kill can leave a partial last line, whose row is scored again.
    part.write_bytes(part.read_bytes()[:-7])
    assert label(folder, "cut", reward) == 0
    assert (folder / "cut" / "labelled.jsonl").read_bytes() == (folder / "whole" / "labelled.jsonl").read_bytes()


def test_scores_of_the_same_rows_with_other_tokens_are_not_reused(folder: Path, reward: Path, monkeypatch: Any) -> None:
    """An earlier version, which gave the answers of a pair other contexts, may have left such scores."""
    from offline_align.data.bins import SampleSource
    from offline_align.model.heads import RewardModel

    assert label(folder, "whole", reward) == 0
    original = RewardModel.forward
    signals = iter([signal.SIGUSR1])

    def stop_at_once(self: RewardModel, batch: PackedBatch) -> Tensor:
        for number in signals:
            os.kill(os.getpid(), number)
        return original(self, batch) + 1

    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "forward", stop_at_once)
        patch.setattr(SampleSource, "fingerprint", lambda self: 0)
        assert label(folder, "earlier", reward) == 75
    assert label(folder, "earlier", reward) == 0
    assert scores(folder, "earlier") == scores(folder, "whole")


@pytest.mark.parametrize("kind", ["sample", "pair"])
def test_a_row_that_does_not_fit_is_left_out_counted_and_named(
    folder: Path, reward: Path, kind: str, capsys: Any, caplog: Any
) -> None:
    # Files of the same name, because `label` writes the name as the source of their rows.
    clean = folder / kind / "files" / "rows.jsonl"
    clean.parent.mkdir(parents=True)
    rows = samples(4) if kind == "sample" else pairs(4)
    long = rows[1] | {"id": "long", "response" if kind == "sample" else "rejected": "red " * 200}
    write_jsonl(clean, rows)
    path = write_jsonl(folder / kind / "rows.jsonl", [*rows[:2], long, *rows[2:]])
    words = [f"init.from={reward}", "data.max_length=64", "run.device=cpu", "data.too_long=drop"]

    def start(name: str, file: Path, *more: str) -> int:
        return run(["label", f"run.dir={folder / kind / name}", f"data.input={file}", *words, *more])

    assert start("out", path) == 0
    assert "5 rows: 1 left out (1 response_too_long); see data.max_length=64" in caplog.messages
    assert start("clean", clean) == 0
    outputs = [(folder / kind / name / "labelled.jsonl").read_bytes() for name in ("out", "clean")]
    assert outputs[0] == outputs[1]
    (named,) = map(json.loads, (folder / kind / "out" / "left_out.jsonl").read_text().splitlines())
    assert named == {"id": "long", "reason": "response_too_long"}
    assert not (folder / kind / "clean" / "left_out.jsonl").exists()
    manifest = json.loads((folder / kind / "out" / "manifest.json").read_text())
    assert (manifest["extra"]["dropped"], manifest["extra"]["bad_rows"]) == ({"response_too_long": 1}, {})
    assert "left_out.jsonl" in {output["path"] for output in manifest["outputs"]}
    assert start("none", path, "data.max_length=3") == 65
    assert "none of 5 rows is left: 5 response_too_long; see data.max_length=3" in capsys.readouterr().err


def test_labelling_again_keeps_where_rows_came_from(folder: Path, reward: Path) -> None:
    assert label(folder, "whole", reward) == 0
    path = folder / "whole" / "labelled.jsonl"
    words = [f"init.from={reward}", f"data.input={path}", "data.max_length=128", "run.device=cpu"]
    assert run(["label", f"run.dir={folder / 'second'}", *words]) == 0
    first, second = (
        [json.loads(line) for line in (folder / name / "labelled.jsonl").read_text().splitlines()]
        for name in ("whole", "second")
    )
    assert [(row["id"], row["source_id"]) for row in second] == [(row["id"], row["source_id"]) for row in first]
    assert ("p0/chosen", "p0") in {(row["id"], row["source_id"]) for row in second}


def test_rewards_on_the_scale_of_an_earlier_run(folder: Path, reward: Path, capsys: Any) -> None:
    assert label(folder, "whole", reward) == 0
    first = json.loads((folder / "whole" / "reward_stats.json").read_text())

    def again(name: str, data: Path, *words: str) -> int:
        given = [f"init.from={reward}", f"data.input={data}", "data.max_length=128", "run.device=cpu", *words]
        return run(["label", f"run.dir={folder / name}", *given])

    new = write_jsonl(folder / "new.jsonl", samples(7))
    assert again("more", new, f"label.statistics={folder / 'whole'}") == 0
    # The scale of a set that has an earlier one's is that of the earlier one.
    assert (
        again("still_more", folder / "pairs.jsonl", f"label.statistics={folder / 'second' / 'reward_stats.json'}") == 0
    )
    for name, count in (("more", 7), ("still_more", 24)):
        rows = [json.loads(line) for line in (folder / name / "labelled.jsonl").read_text().splitlines()]
        expected = [(row["reward_raw"] - first["mean"]) / first["std"] for row in rows]
        assert [row["reward"] for row in rows] == pytest.approx(expected)
        stats = json.loads((folder / name / "reward_stats.json").read_text())
        assert stats["normalised_with"] == {"mean": first["mean"], "std": first["std"]}
        assert (stats["count"], stats["mean"]) == (count, pytest.approx(sum(r["reward_raw"] for r in rows) / count))
    manifest = read_manifest(folder / "more")
    assert manifest is not None
    assert [Path(record.path).name for record in manifest.inputs] == ["new.jsonl", "reward_stats.json"]
    assert [parent.stage for parent in manifest.parents] == ["reward", "label"]
    assert run(["verify", f"run.dir={folder / 'second'}"]) == 0
    # The folder and the file in it are the same setting; no statistics, or others, are another run.
    assert again("more", new, f"label.statistics={folder / 'whole' / 'reward_stats.json'}") == 0
    assert again("more", new) == 78
    capsys.readouterr()
    for given, code, said in (
        (folder / "nowhere", 78, "label.statistics="),
        (folder / "base", 78, "reward_stats.json: no such file"),
        (new, 65, "does not hold the statistics of rewards"),
    ):
        assert again("never", new, f"label.statistics={given}") == code
        assert said in capsys.readouterr().err
    start = continued(folder / "base")
    other = train("reward", folder / "other_model", folder / "pairs.jsonl", "run.seed=11", model=start)
    words = ["label", f"run.dir={folder / 'never'}", f"init.from={other}", f"data.input={new}", *start[1:3]]
    assert run([*words, f"label.statistics={folder / 'whole'}"]) == 78
    assert "has rewards of another reward model than" in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_validation_rows_on_another_scale_are_reported(folder: Path, reward: Path, caplog: Any) -> None:
    assert label(folder, "whole", reward) == 0
    new = write_jsonl(folder / "valid.jsonl", samples(9))
    words = [f"init.from={reward}", f"data.input={new}", "data.max_length=128", "run.device=cpu"]
    for name, more in (("own_scale", []), ("same_scale", [f"label.statistics={folder / 'whole'}"])):
        assert run(["label", f"run.dir={folder / name}", *words, *more]) == 0
        caplog.clear()
        valid = f"data.valid={folder / name / 'labelled.jsonl'}"
        rows, start = folder / "whole" / "labelled.jsonl", continued(folder / "base")
        trained = train("ca", folder / f"ca_{name}", rows, valid, "method.target_reward=1.0", model=start)
        said = [message for message in caplog.messages if message.startswith("data.valid: its rewards are")]
        assert len(said) == (name == "own_scale")
        stats = json.loads((folder / "whole" / "reward_stats.json").read_text())
        facts = json.loads((trained / "manifest.json").read_text())["extra"]["data"]
        assert facts["reward_scale"]["mean"] == pytest.approx(stats["mean"])
        assert facts["reward_scale"]["std"] == pytest.approx(stats["std"])
        for line in said:
            assert f"mean {stats['mean']:.4g} and std {stats['std']:.4g}" in line and "label.statistics=" in line


def test_a_hugging_face_reward_model_scores_the_same(folder: Path, reward: Path) -> None:
    theirs = folder / "theirs"
    assert run(["convert", f"init.from={reward}", f"run.dir={theirs}", "run.device=cpu"]) == 0
    assert label(folder, "whole", reward) == 0
    assert label(folder, "of_theirs", theirs) == 0
    assert scores(folder, "of_theirs") == pytest.approx(scores(folder, "whole"), abs=1e-5)
    manifest = read_manifest(folder / "of_theirs")
    assert manifest is not None
    assert [parent.stage for parent in manifest.parents] == ["convert"]
    assert manifest.extra["template"] == "paper"
    assert run(["verify", f"run.dir={folder / 'of_theirs'}"]) == 0
    assert label(folder, "never", theirs, "data.template=chat") == 78
    plan = ["plan", f"run.dir={folder / 'plan'}", f"data.input={folder / 'of_theirs' / 'labelled.jsonl'}"]
    assert run(plan) == 0
    assert json.loads((folder / "plan" / "plan.json").read_text())["unit"] == "tokens"


def test_a_hugging_face_reward_model_judges_the_same(folder: Path, reward: Path, capsys: Any) -> None:
    theirs = folder / "judge_theirs"
    assert run(["convert", f"init.from={reward}", f"run.dir={theirs}", "run.device=cpu"]) == 0
    for name, text in (("a", "red please"), ("b", "blue")):
        row = {"id": "x", "prompt": "Say red", "response": text, "finish_reason": "stop", "condition": None}
        write_jsonl(folder / f"{name}.jsonl", [row])
    found = []
    for judge in (reward, theirs):
        words = [f"judge.model={judge}", f"data.input=[{folder / 'a.jsonl'},{folder / 'b.jsonl'}]", "run.device=cpu"]
        target = folder / f"report_{judge.name}"
        assert run(["evaluate", f"run.dir={target}", *words, "evaluate.bootstrap_samples=20"]) == 0
        overall = json.loads((target / "report.json").read_text())["overall"]
        found.append([overall[name]["score"]["mean"] for name in sorted(overall)])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    policy = folder / "judge_policy"
    assert run(["convert", f"init.from={folder / 'base'}", f"run.dir={policy}", "run.device=cpu"]) == 0
    capsys.readouterr()
    assert run(["evaluate", f"run.dir={folder / 'never'}", f"judge.model={policy}", words[1]]) == 78
    assert f"judge.model={policy}: is a policy" in capsys.readouterr().err
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    assert run(["evaluate", f"run.dir={folder / 'never'}", f"judge.model={theirs}", words[1]]) == 78
    assert f"judge.model: {theirs}/config.json: architectures=['Other']" in capsys.readouterr().err


def test_an_empty_answer_is_scored_at_its_end_of_sequence(folder: Path, reward: Path) -> None:
    """A policy may give an empty answer, which `evaluate` must score like any other."""
    from offline_align.config.sections import DataSection, ParallelSection
    from offline_align.data.records import Message, Sample
    from offline_align.label.scoring import score_samples
    from offline_align.model.description import find_checkpoint

    asked = (Message("user", "Say red"),)
    samples = [Sample(str(i), asked, text, {}) for i, text in enumerate(["red please", "", "red please"])]
    sections = (RunSection(dir=str(folder / "judge"), device=Device.cpu), DataSection(max_length=64))
    found = score_samples(find_checkpoint(reward), samples, *sections, ParallelSection(), ComputeSection())
    assert found[0] == pytest.approx(found[2], abs=1e-6)
    assert found[1] != pytest.approx(found[0], abs=1e-6)
    long = [*samples, Sample("0", asked, "red " * 100, {})]
    again = score_samples(find_checkpoint(reward), long, *sections, ParallelSection(), ComputeSection())
    assert again[:3] == pytest.approx(found, abs=1e-6)
    assert math.isnan(again[3]), "an answer that does not fit has no score, and the others keep theirs"


def test_scores_do_not_depend_on_batch_order_or_packing(folder: Path, reward: Path) -> None:
    """Batches of 1 to 32 full rows, sorted, shuffled or each row alone agree within 1e-5 and in the ranking."""
    from random import Random

    from offline_align.config.sections import DataSection, ParallelSection
    from offline_align.data.records import Message, Sample
    from offline_align.label.scoring import score_samples
    from offline_align.model.description import find_checkpoint

    rows = samples(32)
    given = [Sample(row["id"], (Message("user", row["prompt"]),), row["response"], {}) for row in rows]
    sections = (RunSection(dir=str(folder / "invariance"), device=Device.cpu), DataSection(max_length=64))

    def score(order: list[Sample], batch: int = 1) -> dict[str, float]:
        trainer = ComputeSection(micro_batch_size=batch)
        found = score_samples(find_checkpoint(reward), order, *sections, ParallelSection(), trainer)
        return dict(zip([sample.id for sample in order], found, strict=True))

    expected = score(given)
    shuffled = Random(3).sample(given, len(given))
    by_length = sorted(given, key=lambda sample: -len(sample.response))
    attempts = [score(given, batch) for batch in (2, 3, 5, 8, 16, 32)] + [score(shuffled, 4), score(by_length, 4)]
    attempts.append({sample.id: score([sample])[sample.id] for sample in given[:8]})
    ranking = sorted(expected, key=expected.__getitem__)
    for found in attempts:
        assert found == pytest.approx({row: expected[row] for row in found}, abs=1e-5)
        for lower, higher in itertools.pairwise(ranking):
            if {lower, higher} <= found.keys() and expected[higher] - expected[lower] > 1e-5:
                assert found[lower] < found[higher]


def test_a_change_of_model_or_template_is_another_run(folder: Path, reward: Path, capsys: Any) -> None:
    """Finished scores are not reused for another reward model, even of the same size."""
    import shutil

    assert label(folder, "whole", reward) == 0
    start = continued(folder / "base")
    other = train("reward", folder / "other", folder / "pairs.jsonl", "run.seed=7", model=start)
    assert label(folder, "whole", other) == 78
    assert "other settings or inputs" in capsys.readouterr().err
    # If a tokenizer was replaced without a new manifest, this is found before any row is scored.
    spoiled = folder / "spoiled"
    shutil.copytree(reward, spoiled, symlinks=True)
    (spoiled / "checkpoints" / "latest" / "tokenizer" / "tokenizer.model").write_bytes(sentencepiece_model())
    assert label(folder, "never", spoiled) == 74
    assert "is not the tokenizer" in capsys.readouterr().err
    assert label(folder, "never", reward, "data.template=chat") == 78
    assert "data.template=chat" in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_a_reward_model_with_scores_that_are_not_finite_is_reported(
    folder: Path, reward: Path, monkeypatch: Any, capsys: Any
) -> None:
    scores_of_all(math.nan, monkeypatch)
    assert label(folder, "nan", reward) == 65
    said = capsys.readouterr().err
    assert "row s0" in said and "not finite (64 such rows)" in said
    assert not (folder / "nan" / "labelled.jsonl").exists()


@pytest.mark.parametrize("rows", [1, 3])
def test_one_row_and_equal_rewards_are_labelled_with_zeros(
    folder: Path, reward: Path, rows: int, monkeypatch: Any
) -> None:
    scores_of_all(2.5, monkeypatch)
    path = write_jsonl(folder / f"constant{rows}.jsonl", samples(rows))
    words = [f"init.from={reward}", f"data.input={path}", "data.max_length=128", "run.device=cpu"]
    assert run(["label", f"run.dir={folder / f'constant{rows}'}", *words]) == 0
    found = [json.loads(line) for line in (folder / f"constant{rows}" / "labelled.jsonl").read_text().splitlines()]
    assert [(row["reward_raw"], row["reward"]) for row in found] == [(2.5, 0.0)] * rows


def test_ids_of_rows_without_one_and_of_pairs(folder: Path, reward: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "response": "b", "id": None},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    path = write_jsonl(folder / "unnamed.jsonl", rows)
    words = [f"init.from={reward}", f"data.input={path}", "data.max_length=128", "run.device=cpu"]
    assert run(["label", f"run.dir={folder / 'unnamed'}", *words]) == 0
    found = [json.loads(line) for line in (folder / "unnamed" / "labelled.jsonl").read_text().splitlines()]
    assert [(row["id"], row["source_id"]) for row in found] == [
        ("unnamed.jsonl:1", "unnamed.jsonl:1"),
        ("unnamed.jsonl:2/chosen", "unnamed.jsonl:2"),
        ("unnamed.jsonl:2/rejected", "unnamed.jsonl:2"),
    ]


def test_bad_rows_are_skipped_and_do_not_change_the_others(folder: Path, reward: Path) -> None:
    good = [json.dumps(row) for row in samples(5)]
    clean, mixed = folder / "clean" / "rows.jsonl", folder / "mixed" / "rows.jsonl"
    for path, lines in ((clean, good), (mixed, ["nonsense", *good[:3], '{"prompt": 1}', *good[3:], "[1]"])):
        path.parent.mkdir()
        path.write_text("\n".join(lines))
    words = [f"init.from={reward}", "data.max_length=128", "run.device=cpu"]
    assert run(["label", f"run.dir={folder / 'clean-out'}", f"data.input={clean}", *words]) == 0
    mixed_words = ["label", f"run.dir={folder / 'mixed-out'}", f"data.input={mixed}", *words]
    assert run(mixed_words) == 65
    assert not (folder / "mixed-out" / "labelled.jsonl").exists()
    assert run([*mixed_words, "data.on_bad_row=skip"]) == 0
    outputs = [(folder / name / "labelled.jsonl").read_bytes() for name in ("clean-out", "mixed-out")]
    assert outputs[0] == outputs[1]
    kept = [json.loads(line) for line in (folder / "mixed-out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in kept] == [1, 5, 8]
    manifest = json.loads((folder / "mixed-out" / "manifest.json").read_text())
    assert sum(manifest["extra"]["bad_rows"].values()) == 3


def test_a_fraction_of_the_rows_is_scored_again_for_the_certificate(folder: Path, reward: Path) -> None:
    assert label(folder, "certified", reward, "label.certificate_fraction=0.2") == 0
    found = json.loads((folder / "certified" / "certificate.json").read_text())
    assert found["rows"] == 13
    assert 0 <= found["largest_difference"] < 1e-5
    assert (found["rank_flips"], found["sign_flips"]) == (0, 0)
    manifest = json.loads((folder / "certified" / "manifest.json").read_text())
    assert manifest["extra"]["certificate"] == found
    assert manifest["extra"]["seconds"] > 0
    assert "certificate.json" in {record["path"] for record in manifest["outputs"]}
    assert label(folder, "uncertified", reward, "label.certificate_fraction=0") == 0
    assert not (folder / "uncertified" / "certificate.json").exists()


def test_the_best_answers_are_compared_as_a_method(folder: Path, reward: Path, capsys: Any) -> None:
    """`label.best_of=1` of three answers a prompt: the highest reward, in the form of `generate`."""
    common = ["data.max_length=128", "run.device=cpu", "generate.max_new_tokens=6"]
    prompts = [{"id": f"q{k}", "prompt": text} for k, text in enumerate(("Name cat", "Name owl", "Name dog"))]
    asked = write_jsonl(folder / "questions.jsonl", prompts)
    policy = [f"init.from={folder / 'base'}", f"data.input={asked}", *common]
    several = ["generate.n=3", "generate.temperature=1"]
    assert run(["generate", f"run.dir={folder / 'several'}", *policy, *several]) == 0
    assert run(["generate", f"run.dir={folder / 'one_answer'}", *policy]) == 0
    chosen = folder / "chosen"
    words = [f"run.dir={chosen}", f"init.from={reward}", "data.max_length=128", "run.device=cpu", "label.best_of=1"]
    assert run(["label", *words, f"data.input={folder / 'several' / 'generations.jsonl'}"]) == 0

    rewards: dict[str, list[float]] = {}
    for line in (chosen / "labelled.jsonl").read_text().splitlines():
        row = json.loads(line)
        rewards.setdefault(row["source_id"], []).append(row["reward_raw"])
    best = [json.loads(line) for line in (chosen / "best.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample_index"], row["reward_raw"]) for row in best] == [
        (name, 0, max(values)) for name, values in rewards.items()
    ]
    assert [len(values) for values in rewards.values()] == [3, 3, 3]

    both = f"data.input=[{folder / 'one_answer' / 'generations.jsonl'},{chosen / 'best.jsonl'}]"
    judged = [f"judge.model={reward}", "run.device=cpu", "data.max_length=128", "evaluate.bootstrap_samples=20"]
    assert run(["evaluate", f"run.dir={folder / 'best_judged'}", both, *judged]) == 0
    report = json.loads((folder / "best_judged" / "report.json").read_text())
    assert report["methods"] == ["sft", "sft best of 3"]
    means = {name: one["score"]["mean"] for name, one in report["overall"].items()}
    assert means["sft best of 3"] == pytest.approx(sum(map(max, rewards.values())) / 3, abs=1e-5)
    # Its hours contain sampling and labelling, and no policy learned from these labels.
    assert report["cost"]["methods"]["sft best of 3"]["hours"].keys() == {"sft", "reward", "generate", "label"}
    assert "drift" not in report

    capsys.readouterr()
    rows = f"data.input={folder / 'rows.jsonl'}"
    assert run(["label", f"run.dir={folder / 'not_answers'}", *words[1:], rows]) == 65
    assert "label.best_of=1: row" in capsys.readouterr().err


def test_an_empty_answer_of_generate_is_labelled_and_trained_around(folder: Path, reward: Path, capsys: Any) -> None:
    """A policy may end at once. Its answer gets a reward; rows without a target are left out of training."""
    rows = [
        {"id": "a", "prompt": "Say red", "response": text, "finish_reason": "stop", "sample_index": k}
        for k, text in enumerate(("red please", "", "red"))
    ]
    answers = write_jsonl(folder / "answers.jsonl", rows)
    words = [f"init.from={reward}", "data.max_length=128", "run.device=cpu", "label.best_of=3"]
    assert run(["label", f"run.dir={folder / 'ended'}", f"data.input={answers}", *words]) == 0
    labelled = folder / "ended" / "labelled.jsonl"
    assert [json.loads(line)["response"] for line in labelled.read_text().splitlines()] == ["red please", "", "red"]
    policy = train("fa", folder / "trained_around", labelled, "method.threshold=-9", model=continued(folder / "base"))
    manifest = read_manifest(policy)
    assert manifest is not None
    assert manifest.extra["data"]["dropped"] == {"no_target": 1}
    capsys.readouterr()
    without = write_jsonl(folder / "typed.jsonl", [{"prompt": "Say red", "response": ""}])
    assert run(["label", f"run.dir={folder / 'typed'}", f"data.input={without}", *words[:3]]) == 65
    assert "typed.jsonl:1: response: empty" in capsys.readouterr().err
