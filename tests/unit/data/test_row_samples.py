"""The sources of rows, and the rows that `data.sample` chooses: even, and whatever the order of files is."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow, SampleBy, SampledDataSection
from offline_align.data.records import (
    BadRows,
    LabelledSample,
    PreferencePair,
    Sample,
    names_of_files,
    read_rows,
    read_rows_and_pairs,
)
from offline_align.data.sampling import choose, epoch_in_words, in_words, sources

Row = Sample | PreferencePair


def sft(number: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "response": f"answer {number}", **columns}


def pair(number: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": "good", "rejected": f"poor {number}", **columns}


def read(folder: Path, files: dict[str, list[dict[str, Any]]]) -> list[Row]:
    paths = [folder / f"{name}.jsonl" for name in files]
    for path, rows in zip(paths, files.values(), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows_and_pairs(paths, Sample, BadRows(OnBadRow.fail, None)))


def texts(rows: list[Row]) -> Counter[tuple[str, str]]:
    return Counter((row.prompt[-1].content, row.response if isinstance(row, Sample) else row.rejected) for row in rows)


def chosen(rows: list[Row], count: int, by: SampleBy = SampleBy.row, seed: int = 1234) -> list[Row]:
    return choose(rows, SampledDataSection(sample=count, sample_by=by), seed).rows


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (9, {"a": 3, "b": 3, "c": 3}),
        (30, {"a": 10, "b": 10, "c": 10}),
        (60, {"a": 25, "b": 25, "c": 10}),
        (110, {"a": 60, "b": 40, "c": 10}),
        (1000, {"a": 100, "b": 40, "c": 10}),
    ],
)
def test_sources_give_equally_and_share_what_one_of_them_lacks(
    tmp_path: Path, count: int, expected: dict[str, int]
) -> None:
    files = {"a": range(100), "b": range(100, 140), "c": range(200, 210)}
    rows = read(tmp_path, {name: [sft(n) for n in numbers] for name, numbers in files.items()})
    found = choose(rows, SampledDataSection(sample=count), seed=7)
    assert Counter(found.sources) == expected
    assert {name: number["sampled"] for name, number in found.counts.items()} == expected
    assert {name: number["rows"] for name, number in found.counts.items()} == {"a": 100, "b": 40, "c": 10}
    assert found.rows == [row for row in rows if row in found.rows], "in the order of the files"


def test_what_does_not_divide_goes_to_single_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, {name: [sft(n + 100 * k) for n in range(50)] for k, name in enumerate("abc")})
    found = choose(rows, SampledDataSection(sample=32), seed=7)
    assert sorted(Counter(found.sources).values()) == [10, 11, 11]


def test_sft_rows_and_pairs_give_one_half_each_as_in_the_paper(tmp_path: Path) -> None:
    one, two, three = ([sft(n + 1000 * k, source=name) for n in range(200)] for k, name in enumerate(("x", "y", "z")))
    rows = read(tmp_path, {"sft": [*one, *two, *three], "preferences": [pair(n, source="x") for n in range(500)]})
    found = choose(rows, SampledDataSection(sample=300), seed=7)
    assert Counter(found.sources) == {"x": 50, "y": 50, "z": 50, "x/pairs": 150}
    by_row = choose(rows, SampledDataSection(sample=300, sample_by=SampleBy.row), seed=7)
    assert Counter(by_row.sources)["x/pairs"] == pytest.approx(300 * 500 / 1100, abs=30)


def test_answers_of_pairs_are_not_of_the_source_of_sft_rows() -> None:
    def labelled(row_id: str, **columns: Any) -> LabelledSample:
        return LabelledSample(row_id, (), row_id, columns, 0.0, 0.0, row_id, file="labelled")

    rows = [labelled("a", source="demo"), labelled("p/chosen", source="demo", answer="chosen"), labelled("b")]
    assert sources(rows, "source") == ["demo", "demo/pairs", "labelled"]
    assert sources(rows[1:], "source") == ["demo", "labelled"], "only if SFT rows have a source of the same name"
    assert sources(rows, None) == ["labelled", "labelled/pairs", "labelled"]


def test_another_column_may_name_the_source(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {"a": [sft(1, topic="x", source="s"), sft(2, topic=3), sft(3, topic=" "), sft(4, topic=None)]}
    )
    assert sources(rows, "topic") == ["x", "3", "a", "a"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["d/a.jsonl", "d/b.jsonl.gz", "d/c.x.zst"], ["a", "b", "c"]),
        (["one/rows.jsonl", "two/rows.jsonl", "two/others.jsonl"], ["one/rows", "two/rows", "others"]),
        (["hh/train-00000-of-00002.jsonl", "hh/train-00001-of-00002.jsonl", "a.jsonl"], ["train", "train", "a"]),
        (["a/train-0-of-2.jsonl", "b/train-0-of-2.jsonl"], ["a/train", "b/train"]),
    ],
)
def test_names_of_files(paths: list[str], names: list[str]) -> None:
    assert list(names_of_files([Path(path) for path in paths]).values()) == names


@pytest.mark.parametrize("by", SampleBy)
def test_the_sample_does_not_depend_on_the_order_of_files_and_rows(tmp_path: Path, by: SampleBy) -> None:
    files = {"a": [sft(n) for n in range(80)], "b": [pair(n) for n in range(50)], "c": [sft(n) for n in range(90, 120)]}
    expected = texts(chosen(read(tmp_path, files), 37, by))
    chance = random.Random(5)
    for _ in range(3):
        names = list(files)
        chance.shuffle(names)
        shuffled = {name: chance.sample(files[name], len(files[name])) for name in names}
        assert texts(chosen(read(tmp_path, shuffled), 37, by)) == expected
    moved = {"a": files["a"][:30], "c": [*files["a"][30:], *files["c"]], "b": files["b"]}
    assert by is not SampleBy.row or texts(chosen(read(tmp_path, moved), 37, by)) == expected


def test_new_ids_and_rewards_choose_the_same_rows(tmp_path: Path) -> None:
    rows = [sft(n, id=f"r{n}", source_id="s", reward_raw=1.0, reward=n / 7) for n in range(60)]
    relabelled = [row | {"id": f"other {row['id']}", "reward": row["reward"] - 1.0} for row in rows]
    assert texts(chosen(read(tmp_path, {"a": rows}), 20)) == texts(chosen(read(tmp_path, {"a": relabelled}), 20))


def test_more_data_replace_few_rows_and_a_larger_sample_keeps_the_smaller(tmp_path: Path) -> None:
    rows = [sft(n) for n in range(1100)]
    before = texts(chosen(read(tmp_path, {"a": rows[:1000]}), 200))
    after = texts(chosen(read(tmp_path, {"a": rows}), 200))
    assert 200 - 45 < (before & after).total() < 200
    assert before < texts(chosen(read(tmp_path, {"a": rows[:1000]}), 300))


def test_seeds_choose_other_rows_and_each_row_equally_often(tmp_path: Path) -> None:
    rows = read(tmp_path, {"a": [sft(n) for n in range(40)]})
    times = sum((texts(chosen(rows, 10, seed=seed)) for seed in range(400)), Counter())
    assert len(times) == 40
    # Each row is chosen with probability 1/4 in 400 samples: 100 times, with a standard deviation of 8.7.
    assert all(60 < number < 140 for number in times.values())


def test_rows_with_equal_texts_are_chosen_independently(tmp_path: Path) -> None:
    rows = [sft(n % 30, id=f"r{n}") for n in range(60)]
    twice = [n for n in texts(chosen(read(tmp_path, {"a": rows}), 30)).values() if n == 2]
    # If both or none of two copies were chosen, there would be 15.
    assert 2 < len(twice) < 13
    ids = {row.id for row in chosen(read(tmp_path, {"a": rows}), 30)}
    assert {row.id for row in chosen(read(tmp_path, {"a": rows[::-1]}), 30)} == ids


def test_rows_without_ids_may_be_the_same_to_the_byte(tmp_path: Path) -> None:
    assert len(chosen(read(tmp_path, {"a": [sft(1)] * 10}), 4)) == 4


def test_a_file_of_one_kind_names_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair(1) | {"margin": 1.0}) + "\n")
    (row,) = read_rows([path], PreferencePair, BadRows(OnBadRow.fail, None))
    assert row.file == "rows"


def test_counts_in_words() -> None:
    counts = {"hh": {"rows": 850, "sampled": 150}, "dolly": {"rows": 150, "sampled": 150}}
    assert in_words(counts) == "300 of 1,000 rows: hh 150 of 850, dolly 150"
    mixed = {name: {**count, "used": 100, "epoch": 100 * k} for k, (name, count) in enumerate(counts.items())}
    assert epoch_in_words(mixed) == "an epoch of 100 rows: dolly 100 (1x)"
    many = {f"s{n}": {"rows": 1, "sampled": 1} for n in range(20)}
    assert in_words(many).endswith("s11 1, and 8 more")
