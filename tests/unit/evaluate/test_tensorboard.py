"""The numbers of a report that become scalars, and the warning if the folder cannot be written."""

from pathlib import Path
from typing import Any

import pytest

from offline_align.evaluate.report import Report
from offline_align.evaluate.sections import Section
from offline_align.evaluate.tensorboard import scalars, write_board
from offline_align.tensorboard_writer import FOLDER


def report(content: dict[str, Any], **results: Any) -> Report:
    return Report(results, sections=[Section("part", "Why?", "", ["found"], content)])


def test_estimates_stand_for_their_means() -> None:
    estimate = {"mean": 1.5, "low": 1.0, "high": 2.0}
    made = report({"methods": {"fa": {"kl": estimate, "kl_prompts": 3}}}, overall={"fa": {"score": estimate}})
    assert scalars(made) == {"score/fa": 1.5, "part/methods/fa/kl": 1.5, "part/methods/fa/kl_prompts": 3.0}


def test_what_is_no_number_or_not_known_is_left_out() -> None:
    unknown = {"mean": None, "low": None, "high": None}
    content = {"accuracy": unknown, "rows": [1, 2], "name": "x", "sure": True, "ece": None}
    assert scalars(report(content)) == {}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("a file")
    write_board(tmp_path, report({}), {}, "words")
    assert "tensorboard: cannot be written" in caplog.text
