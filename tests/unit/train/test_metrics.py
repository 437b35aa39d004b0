"""metrics.jsonl stays readable through kills and NaN."""

import json
from pathlib import Path

from offline_align.train.metrics import FILE_NAME, MetricsWriter


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_a_line_a_step_and_nan_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, True, 1) as writer:
        writer.write(1, {"loss": 2.0})
        writer.write(2, {"loss": float("nan")})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]


def test_steps_that_are_done_again_replace_their_lines(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 3, "lo')
    with MetricsWriter(tmp_path, True, 2) as writer:
        writer.write(2, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.0}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, False, 1) as writer:
        writer.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
