"""The output of commands in a file or a pipe."""

import pytest
from rich.table import Table
from rich.text import Text

from offline_align import __version__
from offline_align.__main__ import run
from offline_align.stages.output import show


def test_lines_in_a_file_are_neither_wrapped_nor_padded(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("short", "a")
    table.add_row("long", "b " * 300)
    show(table, Text("c " * 300))
    assert capsys.readouterr().out == f"short  a\nlong   {('b ' * 300).rstrip()}\n{('c ' * 300).rstrip()}\n"


def test_a_dry_run_has_no_trailing_spaces_and_shows_small_models_in_millions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["sft", "dry_run=true", "run.dir=x", "model=demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert "parameters     688,768 (0.69 M)" in lines


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"offline-align {__version__}\n"
