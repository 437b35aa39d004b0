"""Inputs of every kind give the same lines; damaged files are named."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.data.sources import Source, held_out_files, input_sources, read_source
from offline_align.errors import AlignError, ConfigError, DataError
from tests.support import free_ports

ROWS: list[dict[str, Any]] = [{"prompt": f"naïve {i}", "response": "b", "n": i} for i in range(5)]
STRICT = BadRows(OnBadRow.fail, None)


def values(source: Source, max_rows: int | None = None) -> list[dict[str, Any]]:
    return [line.value for line in read_source(source, STRICT, max_rows)]


def write(path: Path) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(json.dumps(ROWS, indent=1) if path.name == "array.json" else text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "array.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    [source] = input_sources(str(write(tmp_path / name)), "data.input")
    assert values(source) == ROWS
    assert values(source, max_rows=2) == ROWS[:2]
    assert [line.number for line in read_source(source, STRICT, None)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", ["", "#train"])
def test_a_local_data_set_through_datasets(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "train.jsonl")
    [source] = input_sources(f"hf:{tmp_path}{suffix}", "data.input")
    assert values(source, max_rows=3) == ROWS[:3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:squad", ("squad", None, "train")),
        ("hf:Anthropic/hh-rlhf", ("Anthropic/hh-rlhf", None, "train")),
        ("hf:Anthropic/hh-rlhf/helpful-base#test", ("Anthropic/hh-rlhf", "helpful-base", "test")),
    ],
)
def test_the_arguments_of_load_dataset(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None, str]
) -> None:
    import datasets

    asked = []

    def load(path: str, data_dir: str | None, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((path, data_dir, split))
        return iter(ROWS if streaming else [])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert values(Source(name, None)) == ROWS
    assert asked == [expected]


def test_a_hub_out_of_reach_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the Hub would try again for a minute, with two lines each time."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ConfigError, match=r"hf:no/such: 127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        values(Source("hf:no/such", None))


def test_a_data_set_that_cannot_be_loaded_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.input=hf:.*cannot be loaded") as error:
        values(Source(f"hf:{tmp_path}", None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"a": 1},'),
        ("a.json", b'[{"a": "\xff"}]'),
        ("a.json", b"[" * 100_000),
        ("a.json", b'[{"a": 1e999}]'),
        ("a.json", b"[1]"),
        ("a.parquet", b"PAR1 no"),
        ("a.arrow", b"ARROW1 no"),
        ("a.csv", b"prompt,response\na,b,c\n"),
        ("a.csv", b"prompt,response\na\n"),
        ("a.csv", b"prompt,prompt\na,b\n"),
        ("a.csv", b'prompt,response\na,"b\n'),
        ("a.csv", b"prompt,response\na,\xff\n"),
    ],
)
def test_damaged_files_are_bad_data(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    [source] = input_sources(str(tmp_path / name), "data.input")
    with pytest.raises(DataError, match=rf"{name}:\d+: "):
        values(source)


def test_cells_of_a_table_are_text_and_rows_are_named_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_text(f',prompt,response\n0,"two\nlines, a comma and a ""quote""",42\n\n1,{long},\n')
    [source] = input_sources(str(path), "data.input")
    found = [(line.number, line.value) for line in read_source(source, STRICT, None)]
    assert found == [
        (2, {"prompt": 'two\nlines, a comma and a "quote"', "response": "42"}),
        (5, {"prompt": long, "response": None}),
    ]


def test_a_float_that_is_not_a_number_is_a_missing_value(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"score": [1.5, float("nan")]}), tmp_path / "a.parquet")
    [source] = input_sources(str(tmp_path / "a.parquet"), "data.input")
    assert values(source) == [{"score": 1.5}, {"score": None}]


def test_a_folder_or_a_pattern_stands_for_its_files(tmp_path: Path) -> None:
    for folder in (".cache", "run"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    (tmp_path / "set" / "run" / "config.yaml").touch()
    for name in ("b.jsonl", "a.parquet", "test.jsonl.gz", ".cache/c.jsonl", "run/sft_train.jsonl"):
        write(tmp_path / "set" / name)
    for name in ("dataset_info.json", "state.json", "README.md"):
        (tmp_path / "set" / name).write_text("{}")
    sources = input_sources([str(tmp_path / "set")], "data.input")
    assert [source.name for source in sources] == ["a.parquet", "b.jsonl", "test.jsonl.gz"]
    held_out = [str(tmp_path / "set" / "test.jsonl.gz")]
    assert held_out_files([str(tmp_path / "set")], sources) == held_out
    assert held_out_files(held_out, input_sources(held_out, "data.input")) == []
    sources = input_sources(str(tmp_path / "set" / "*.jsonl*"), "data.input")
    assert [source.name for source in sources] == ["b.jsonl", "test.jsonl.gz"]
    for pattern in ("*.csv", "none"):
        with pytest.raises(ConfigError, match=r"data\.input=.*: (no file matches|no such file)"):
            input_sources(str(tmp_path / "set" / pattern), "data.input")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: the folder has no data file"):
        input_sources(str(tmp_path / "empty"), "data.input")


def test_names_stay_unique(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "a.jsonl" for folder in "xy"]
    for path in paths:
        path.parent.mkdir()
        write(path)
    sources = input_sources([*map(str, paths), "demo", str(write(tmp_path / "b.jsonl"))], "data.input")
    assert [source.name for source in sources] == [*map(str, paths), "demo", "b.jsonl"]
    assert [source.is_demo for source in sources] == [False, False, True, False]


@pytest.mark.parametrize("value", [None, [], 3, "missing.jsonl", ["demo", "missing.jsonl"]])
def test_settings_that_name_nothing(value: Any) -> None:
    with pytest.raises(AlignError, match=r"data\.input=") as error:
        input_sources(value, "data.input")
    assert error.value.exit_code == 78
