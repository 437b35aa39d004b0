"""`metrics.jsonl` stays readable after kills and with NaN."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    started: dict[str, Any] = {}
    client = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )

    def init(**words: Any) -> SimpleNamespace:
        started.update(words)
        return client

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with MetricsWriter(tmp_path, True, 1, wandb_project="alignment") as writer:
        writer.write(1, {"loss": 2.0, "mfu": float("nan")})
    assert calls == [(1, {"step": 1, "loss": 2.0}), "finish"]
    assert (started["project"], started["resume"], started["dir"]) == ("alignment", "allow", str(tmp_path))
    assert not any("key" in word for word in started)
