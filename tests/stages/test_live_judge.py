"""The judge with a real endpoint, if the environment names one:

    vllm serve MODEL --port 8000 &
    TEST_JUDGE=http://127.0.0.1:8000/v1 TEST_JUDGE_MODEL=MODEL pytest tests/stages/test_live_judge.py

The test checks that every question is asked, counted and stored, not what the model answers.
tests/unit/evaluate/judges/test_served_model.py simulates failures of endpoints.
"""

import json
import os
from pathlib import Path

import pytest

from offline_align.__main__ import run

URL, MODEL = os.environ.get("TEST_JUDGE"), os.environ.get("TEST_JUDGE_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (URL and MODEL), reason="no endpoint: set TEST_JUDGE and TEST_JUDGE_MODEL"),
]
PAIRS = [
    ("What is two and two?", "Four.", "I like trains."),
    ("Name a prime number above ten.", "Eleven.", "Twelve."),
    ("Say hello.", "Hello! How can I help you?", "No."),
]


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    path = tmp_path / "verdicts.jsonl"
    rows = [{"prompt": q, "response_a": good, "response_b": bad, "verdicts": ["a-is-better"]} for q, good, bad in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["set", "pair", "single"])
def test_every_question_is_asked_counted_and_stored(verdicts: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / form
    words = ["judge=openai", f"judge.base_url={URL}", f"judge.model={MODEL}", f"judge.form={form}"]
    assert run(["evaluate", f"run.dir={folder}", *words, f"judge.calibration={verdicts}", "debug=true"]) == 0
    report = json.loads((folder / "report.json").read_text())
    judge, agreement = report["judge"], report["calibration"]["agreement"]
    kept = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert judge["verdicts"] == len(kept) == 2 * len(PAIRS)  # both orders, or both answers
    assert judge["unreadable_verdicts"] == sum(one["scores"] is None for one in kept)
    assert judge["prompt_tokens"] == sum(one["prompt_tokens"] for one in kept) > 100
    assert judge["completion_tokens"] == sum(one["completion_tokens"] for one in kept) > 0
    assert all(1 <= score <= 10 for one in kept for score in one["scores"] or [])
    assert agreement["pairs"] == len(PAIRS)
