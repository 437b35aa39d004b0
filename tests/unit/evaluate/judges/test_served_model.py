"""The served judge against a real HTTP server that speaks the chat completions protocol."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import JudgeKind, JudgeSection
from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.evaluate.judges import served_model
from offline_align.evaluate.judges.served_model import ServedModelJudge, served_model_judge

KEY = "sk-secret-of-the-test"
Reply = Callable[[dict[str, Any]], tuple[int, str]]


class Endpoint:
    """Answers requests with `reply(body)`, as (status, text), and remembers them."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.reply: Reply = by_length
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.keys.add(self.headers["Authorization"])
                status, text = outer.reply(body)
                content = json.dumps(completion(text) if status == 200 else {"error": {"message": text}})
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Stay silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def by_length(body: dict[str, Any]) -> tuple[int, str]:
    """Score every answer by its number of letters."""
    text = body["messages"][1]["content"]
    found = re.findall(r"\[Start of (Assistant \w)'s answer\]\n(.*)\n\[End", text)
    return 200, "Compared.\n" + "\n".join(f"{name}: {len(answer)}" for name, answer in found)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(served_model, "NETWORK_RETRIES", 0)
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, daemon=True)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def make_judge(endpoint: Endpoint, run_dir: Path) -> ServedModelJudge:
    return served_model_judge(JudgeSection(JudgeKind.openai, "judge-model", endpoint.url), run_dir, seed=0)


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
    assert judge.describe() == {
        "kind": "openai",
        "model": "judge-model",
        "verdicts": 6,
        "unreadable_verdicts": 0,
        "prompt_tokens": 600,
        "completion_tokens": 120,
    }


def test_verdicts_are_never_asked_for_twice(endpoint: Endpoint, tmp_path: Path) -> None:
    first = make_judge(endpoint, tmp_path)
    first.score(make_samples(4))
    again = make_judge(endpoint, tmp_path)
    assert again.score(make_samples(6)) == [1.0, 3.0, 5.0] * 6
    assert len(endpoint.bodies) == 6
    assert again.describe()["prompt_tokens"] == 600


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


@pytest.mark.parametrize("status", [429, 500, 503])
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


def test_the_client_tries_again_by_itself(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "NETWORK_RETRIES", 2)
    endpoint.reply = lambda body: (503, "busy") if len(endpoint.bodies) == 1 else by_length(body)
    assert make_judge(endpoint, tmp_path).score(make_samples(1)) == [1.0, 3.0, 5.0]
    assert len(endpoint.bodies) == 2


def test_no_server_at_all_stops_the_run(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = served_model_judge(JudgeSection(JudgeKind.openai, "m", "http://127.0.0.1:9/v1"), tmp_path, 0)
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


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        served_model_judge(JudgeSection(JudgeKind.openai), tmp_path, 0)
    assert len(error.value.problems) == 3
    assert "offline-align[judge]" in str(error.value)
    assert "judge.model is not set" in str(error.value)
    assert "OPENAI_API_KEY is not set" in str(error.value)


def test_a_server_of_ones_own_needs_no_key(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_judge(endpoint, tmp_path).score(make_samples(1)) == [1.0, 3.0, 5.0]
