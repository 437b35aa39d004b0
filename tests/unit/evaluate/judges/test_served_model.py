"""The served judge against a real HTTP server that speaks the chat completions protocol."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.config.sections import JudgeForm, JudgeKind, JudgeSection
from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.evaluate.judges import served_model
from offline_align.evaluate.judges.served_model import ServedModelJudge, served_model_judge
from tests.unit.evaluate.judges.chat_server import HANG_UP, KEY, STALL, Endpoint, by_length


def make_judge(endpoint: Endpoint, run_dir: Path, **settings: Any) -> ServedModelJudge:
    section = JudgeSection(JudgeKind.openai, "judge-model", endpoint.url, **{"retries": 0, **settings})
    return served_model_judge(section, run_dir, seed=0)


def make_samples(prompts: int = 6) -> list[Sample]:
    answers = ["a", "bbb", "ccccc"]
    return [
        Sample(f"p{k}", (Message("user", f"Question {k}?"),), answer, {}) for k in range(prompts) for answer in answers
    ]


def test_scores_come_back_to_their_answers(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = make_judge(endpoint, tmp_path)
    assert judge.score(make_samples()) == [1.0, 3.0, 5.0] * 6
    shown = {re.sub(r"Question \d", "", body["messages"][1]["content"]) for body in endpoint.bodies}
    assert len(shown) > 1, "the order of the answers never changed"
    assert all(body["model"] == "judge-model" and body["temperature"] == 0 for body in endpoint.bodies)
    described = judge.describe()
    places = [p["above_mean"] for p in described.pop("places")]
    assert places == pytest.approx([0, 0, 0]), "every answer stood in every place twice"
    assert described == {
        "kind": "openai",
        "model": "judge-model",
        "form": "set",
        "verdicts": 6,
        "unreadable_verdicts": 0,
        "unreadable_reasons": {},
        "unreadable_by_answer": [0, 0, 0],
        "asked_again": 0,
        "prompt_tokens": 600,
        "completion_tokens": 120,
        "cost": None,
    }


def test_the_cost_is_that_of_the_tokens(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = make_judge(endpoint, tmp_path, prompt_token_price=2.5, completion_token_price=10.0)
    judge.score(make_samples())
    assert judge.describe()["cost"] == pytest.approx((600 * 2.5 + 120 * 10) / 1e6)


@pytest.mark.parametrize(("form", "expected"), [("pair", [0.0, 0.5, 1.0]), ("single", [1.0, 3.0, 5.0])])
def test_pairs_and_single_answers_are_other_forms(
    endpoint: Endpoint, tmp_path: Path, form: str, expected: list[float]
) -> None:
    judge = make_judge(endpoint, tmp_path, form=JudgeForm(form))
    assert judge.score(make_samples()) == expected * 6
    assert len(endpoint.bodies) == 18
    shown = {body["messages"][1]["content"].count("[Start of Assistant") for body in endpoint.bodies}
    assert shown == {2 if form == "pair" else 1}


def test_equal_questions_are_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    twice = [
        Sample(f"{answer}/{order}", (Message("user", "Why?"),), answer, {})
        for order in ("ab", "ba")
        for answer in ("a", "bbb")
    ]
    judge = make_judge(endpoint, tmp_path, form=JudgeForm.single)
    assert judge.score(twice) == [1.0, 3.0, 1.0, 3.0]
    assert len(endpoint.bodies) == 2
    described = judge.describe()
    assert (described["verdicts"], described["prompt_tokens"]) == (2, 200)


def test_position_bias_is_found(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: (200, "Assistant A: 9\nAssistant B: 5\nAssistant C: 4")
    judge = make_judge(endpoint, tmp_path)
    scores = np.array(judge.score(make_samples())).reshape(6, 3)
    assert scores.mean(axis=0) == pytest.approx([6, 6, 6]), "the habit must not favour a method"
    first, second, third = judge.describe()["places"]
    assert (first["above_mean"], second["above_mean"], third["above_mean"]) == pytest.approx((3, -1, -2))
    assert first["low"] > 0 > second["high"]


def test_answers_are_shown_in_the_given_order_if_asked(endpoint: Endpoint, tmp_path: Path) -> None:
    make_judge(endpoint, tmp_path).score(make_samples(4), in_order_from=6)
    shown: dict[str, list[str]] = {}
    for body in endpoint.bodies:
        text = body["messages"][1]["content"]
        shown[text[text.index("Question") :][:10]] = re.findall(r"'s answer\]\n(\w+)\n", text)
    assert shown["Question 2"] == shown["Question 3"] == ["a", "bbb", "ccccc"]
    assert shown["Question 0"] != shown["Question 1"]


def test_verdicts_are_never_asked_for_twice(endpoint: Endpoint, tmp_path: Path) -> None:
    first = make_judge(endpoint, tmp_path)
    first.score(make_samples(4))
    again = make_judge(endpoint, tmp_path)
    assert again.score(make_samples(6)) == [1.0, 3.0, 5.0] * 6
    assert len(endpoint.bodies) == 6
    assert again.describe()["prompt_tokens"] == 600


def test_cached_replies_are_parsed_again(endpoint: Endpoint, tmp_path: Path) -> None:
    first = make_judge(endpoint, tmp_path, form=JudgeForm.single)
    first.score(make_samples(1))
    again, draft, same = (first.cache.get(key) for key in {v.key: 0 for v in first._verdicts})
    assert again and draft and same
    first.cache.add(replace(again, scores=[9.0], reply="Assistant A: 9\nWait: Assistant A deserves 2"))
    first.cache.add(replace(draft, scores=[9.0], reply="Assistant A: 9\nNo:\nAssistant A: 2 (wrong)"))
    asked = len(endpoint.bodies)
    judge = make_judge(endpoint, tmp_path, form=JudgeForm.single)
    judge.score(make_samples(1))
    assert len(endpoint.bodies) == asked + 1
    assert [v.scores for v in judge._verdicts] == [again.scores, [2.0], same.scores]


def test_the_key_is_sent_but_never_written(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        make_judge(endpoint, tmp_path).score(make_samples())
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_an_unreadable_reply_is_asked_for_again_with_a_reminder(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: by_length(body) if len(body["messages"]) > 2 else (200, "I like all of them.")
    judge = make_judge(endpoint, tmp_path)
    assert judge.score(make_samples(1)) == [1.0, 3.0, 5.0]
    first, second = endpoint.bodies
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][:2] == first["messages"]
    assert judge.describe()["prompt_tokens"] == 200


def test_a_verdict_that_stays_unreadable_is_counted(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: (200, "No.") if "Question 1" in body["messages"][1]["content"] else by_length(body)
    judge = make_judge(endpoint, tmp_path)
    scores = judge.score(make_samples(3))
    assert [math.isnan(score) for score in scores] == [False] * 3 + [True] * 3 + [False] * 3
    assert judge.describe()["unreadable_verdicts"] == 1
    assert len(endpoint.bodies) == 2 + served_model.READING_ATTEMPTS


@pytest.mark.parametrize("status", [429, 502, 503])
def test_an_endpoint_that_fails_stops_the_run_with_verdicts_kept(
    endpoint: Endpoint, tmp_path: Path, status: int
) -> None:
    endpoint.reply = lambda b: (status, "busy") if "Question 5" in b["messages"][1]["content"] else by_length(b)
    with pytest.raises(StoppedEarly, match="run the same command again"):
        make_judge(endpoint, tmp_path).score(make_samples(6))
    kept = len((tmp_path / "verdicts.jsonl").read_text().splitlines())
    endpoint.reply, asked = by_length, len(endpoint.bodies)
    assert make_judge(endpoint, tmp_path).score(make_samples(6)) == [1.0, 3.0, 5.0] * 6
    assert len(endpoint.bodies) - asked == 6 - kept


def test_the_client_tries_again_by_itself(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: (503, "busy") if len(endpoint.bodies) == 1 else by_length(body)
    assert make_judge(endpoint, tmp_path, retries=2).score(make_samples(1)) == [1.0, 3.0, 5.0]
    assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("fault", [HANG_UP, STALL])
def test_torn_and_late_replies_are_asked_for_again(endpoint: Endpoint, tmp_path: Path, fault: int) -> None:
    endpoint.reply = lambda body: (fault, "late") if len(endpoint.bodies) == 1 else by_length(body)
    judge = make_judge(endpoint, tmp_path, retries=1, timeout_seconds=0.3)
    assert judge.score(make_samples(1)) == [1.0, 3.0, 5.0]
    assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("body", ["not json", "[]", "{}", '{"choices": []}', '"text"', '{"error": {"message": "no"}}'])
def test_nonsense_is_a_reply_that_cannot_be_read(endpoint: Endpoint, tmp_path: Path, body: str) -> None:
    endpoint.reply = lambda b: (200, body.encode()) if "Question 1" in b["messages"][1]["content"] else by_length(b)
    judge = make_judge(endpoint, tmp_path)
    assert [math.isnan(score) for score in judge.score(make_samples(3))] == [False] * 3 + [True] * 3 + [False] * 3
    assert judge.describe()["unreadable_verdicts"] == 1
    asked = [b for b in endpoint.bodies if "Question 1" in b["messages"][1]["content"]]
    assert len(asked) == served_model.READING_ATTEMPTS


def test_no_server_at_all_stops_the_run(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = served_model_judge(JudgeSection(JudgeKind.openai, "m", "http://127.0.0.1:9/v1", retries=0), tmp_path, 0)
    with pytest.raises(StoppedEarly, match=r"judge\.base_url=http://127\.0\.0\.1:9/v1"):
        judge.score(make_samples(1))


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_names_the_settings(endpoint: Endpoint, tmp_path: Path, status: int) -> None:
    endpoint.reply = lambda body: (status, "no")
    with pytest.raises(ConfigError, match=rf"judge\.model=judge-model: .* answers {status}") as error:
        make_judge(endpoint, tmp_path).score(make_samples(2))
    assert KEY not in str(error.value)


def test_models_that_take_no_temperature_are_asked_without(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda b: (400, "Unsupported value: 'temperature'") if "temperature" in b else by_length(b)
    assert make_judge(endpoint, tmp_path).score(make_samples(1)) == [1.0, 3.0, 5.0]


def test_all_missing_settings_are_reported_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        served_model_judge(JudgeSection(JudgeKind.openai), tmp_path, 0)
    assert len(error.value.problems) == 3
    assert "pip install '.[judge]'" in str(error.value)
    assert "judge.model is not set" in str(error.value)
    assert "OPENAI_API_KEY is not set" in str(error.value)


def test_a_local_server_needs_no_key(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_judge(endpoint, tmp_path).score(make_samples(1)) == [1.0, 3.0, 5.0]
