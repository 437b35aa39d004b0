"""A finished run with other settings: the message names the keys that differ, with both values."""

import re
from pathlib import Path

import pytest

from offline_align.__main__ import run
from tests.training import labelled, write_jsonl


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, list[str]]:
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled([0.5, -0.5] * 7))
    words = ["plan", f"run.dir={tmp_path / 'plan'}", f"data.input={rows}", "model.tokenizer=demo"]
    assert run(words) == 0
    return rows, words


def test_other_values_are_named(finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _, words = finished
    assert run([*words, "method.beta=7", "data.max_length=64", "debug=true"]) == 78
    line = capsys.readouterr().err.splitlines()[-1]
    assert "other settings or inputs: data.max_length=64 (that run: 4096), method.beta=7.0 (that run: 5.0); " in line


def test_other_content_is_named_by_its_key(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words = finished
    write_jsonl(rows, labelled([0.5, -0.5] * 6))
    assert run(words) == 78
    assert f"data.input={rows} (other content than that run read)" in capsys.readouterr().err


def test_a_moved_file_is_not_named_beside_another_key(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words = finished
    moved = rows.rename(rows.with_name("moved.jsonl"))
    words = [word.replace(str(rows), str(moved)) for word in words]
    assert run(words) == 0
    assert run([*words, "method.beta=7"]) == 78
    assert "inputs: method.beta=7.0 (that run: 5.0); choose" in capsys.readouterr().err


def test_settings_that_a_run_of_an_earlier_version_lacks_are_not_named(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words = finished
    config = rows.parent / "plan" / "config.yaml"
    later = re.compile(r"^  (condition|quantiles|quantile_format|bounds|weight_by_reward): .*\n", re.MULTILINE)
    text, removed = later.subn("", config.read_text())
    assert removed == 5
    config.write_text(text)
    assert run(words) == 0
    assert run([*words, "method.beta=7"]) == 78
    assert "inputs: method.beta=7.0 (that run: 5.0); choose" in capsys.readouterr().err
