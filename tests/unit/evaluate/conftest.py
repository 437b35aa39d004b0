"""Generation runs of several methods, written as `generate` writes them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from offline_align.lineage import write_manifest

PROMPTS: list[dict[str, Any]] = [
    {"id": "p1", "prompt": "What is the sky?", "benchmark": "vicuna"},
    {"id": "p2", "prompt": [{"role": "user", "content": "Name a river."}], "benchmark": "mt_bench"},
    {"id": "p3", "prompt": "Count to three.", "benchmark": "vicuna"},
]

WriteRun = Callable[..., Path]


def rows_for(answers: Sequence[str], prompts: Sequence[dict[str, Any]] = PROMPTS) -> list[dict[str, Any]]:
    tail = {"finish_reason": "stop", "condition": None}
    return [{**prompt, "response": answer, **tail} for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    def write_run(
        name: str,
        rows: Sequence[dict[str, Any]],
        method: str | None = None,
        target: float | None = None,
    ) -> Path:
        """Write `<name>/generations.jsonl`, with a manifest where there is a method; return the file."""
        folder = tmp_path / name
        folder.mkdir(parents=True)
        path = folder / "generations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if method is not None:
            condition = None if target is None else {"target_reward": target}
            write_manifest(folder, "generate", name, [], [], [path], {"method": method, "condition": condition})
        return path

    return write_run
