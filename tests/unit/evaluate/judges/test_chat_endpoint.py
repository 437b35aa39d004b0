"""A bad reply costs at most one verdict; only errors that concern all questions end the run."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.sections import JudgeForm, JudgeKind, JudgeSection
from offline_align.data.records import Message, Sample
from offline_align.errors import AlignError, ConfigError, StoppedEarly
from offline_align.evaluate.judges import served_model
from offline_align.evaluate.judges.served_model import ServedModelJudge, served_model_judge
from tests.unit.evaluate.judges.chat_server import HANG_UP, KEY, STALL, Content, Endpoint, by_length, completion

GOOD = [1.0, 3.0, 5.0]


def make_judge(endpoint: Endpoint, run_dir: Path, **settings: Any) -> ServedModelJudge:
    section = JudgeSection(JudgeKind.openai, "judge-model", endpoint.url, **{"retries": 0, **settings})
    return served_model_judge(section, run_dir, seed=0)


def make_samples(prompts: int) -> list[Sample]:
    answers = ["a", "bbb", "ccccc"]
    return [
        Sample(f"p{k}", (Message("user", f"Question {k}?"),), answer, {}) for k in range(prompts) for answer in answers
    ]


def text_of(body: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in body["messages"])


def refusing(word: str, status: int, content: Content) -> Any:
    """Return a server with a fixed answer to questions that contain a word, and verdicts for all others."""
    return lambda body: (status, content) if word in text_of(body) else by_length(body)


FILTER = {"error": {"message": "Held back by the policy.", "type": None, "param": "prompt", "code": "content_filter"}}
REFUSALS: list[tuple[int, Content, str, str]] = [
    (400, FILTER, "content filter", "Held back by the policy."),
    (403, {"error": {"message": "This input was flagged", "code": 403}}, "content filter", "was flagged"),
    (200, completion("", "content_filter"), "content filter", "withheld"),
    (200, completion("Assistant A: 1\nAssistant B: 1\nAssistant C: 1", "content_filter"), "content filter", "1"),
    (400, "This model's maximum context length is 4096 tokens, you asked for 5000.", "too long for the judge", "4096"),
    (413, b"<html><body><h1>413 Request Entity Too Large</h1></body></html>", "too long for the judge", "413 Request"),
    (422, {"detail": [{"loc": ["body"], "msg": "Input is odd"}]}, "HTTP 422", "Input is odd"),
    (429, "Request too large for this model: limit 10000, requested 12000.", "too long for the judge", "12000"),
    (451, "Not here.", "HTTP 451", "Not here."),
    (500, "out of memory", "HTTP 500", "out of memory"),
    (504, b"<html><head><title>504 Gateway Time-out</title></head></html>", "HTTP 504", "504 Gateway Time-out"),
]


@pytest.mark.parametrize("form", ["set", "single"])
@pytest.mark.parametrize(("status", "content", "problem", "words"), REFUSALS)
def test_one_refused_question_is_counted_and_the_others_are_judged(
    endpoint: Endpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    form: str,
    status: int,
    content: Content,
    problem: str,
    words: str,
) -> None:
    endpoint.reply = refusing("Question 0", status, content)
    judge = make_judge(endpoint, tmp_path, form=JudgeForm(form), concurrent_requests=1)
    scores = judge.score(make_samples(3))
    assert all(math.isnan(score) for score in scores[:3])
    assert scores[3:] == GOOD * 2
    described = judge.describe()
    lost = 1 if form == "set" else 3
    assert described["unreadable_verdicts"] == lost
    assert described["unreadable_reasons"] == {problem: lost}
    assert described["unreadable_by_answer"] == [1, 1, 1]
    (said,) = {record.message for record in caplog.records if record.levelname == "WARNING"}
    assert f"verdicts.jsonl: no verdict for p0: {problem}: " in said
    assert words in said
    kept = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [one["problem"] for one in kept if one["scores"] is None] == [problem] * lost


def test_a_refused_question_is_asked_again_by_the_next_run_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = refusing("Question 1", 400, FILTER)
    make_judge(endpoint, tmp_path).score(make_samples(3))
    endpoint.reply, before = by_length, len(endpoint.bodies)
    judge = make_judge(endpoint, tmp_path)
    assert judge.score(make_samples(3)) == GOOD * 3
    assert len(endpoint.bodies) == before + 1
    assert judge.describe()["unreadable_verdicts"] == 0


def test_answers_that_are_refused_alone_are_counted_for_their_method(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = refusing("ccccc", 400, FILTER)
    judge = make_judge(endpoint, tmp_path, form=JudgeForm.pair)
    assert all(math.isnan(score) for score in judge.score(make_samples(2)))
    assert judge.describe()["unreadable_by_answer"] == [2, 2, 4]


def test_sets_in_a_given_order_belong_to_no_method(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = refusing("Question 1", 400, FILTER)
    judge = make_judge(endpoint, tmp_path)
    judge.score(make_samples(2), in_order_from=3)
    assert judge.describe()["unreadable_by_answer"] == [0, 0, 0]


@pytest.mark.parametrize("fault", [HANG_UP, STALL])
def test_a_question_that_never_ends_well_is_passed_over(endpoint: Endpoint, tmp_path: Path, fault: int) -> None:
    endpoint.reply = refusing("Question 0", fault, "late")
    judge = make_judge(endpoint, tmp_path, timeout_seconds=0.3)
    assert judge.score(make_samples(2))[3:] == GOOD
    problem = "no reply in time" if fault == STALL else "connection lost"
    assert judge.describe()["unreadable_reasons"] == {problem: 1}


TEMPERATURE = "Input validation error: `temperature` must be strictly positive"
ADAPTED = [
    ("temperature", 422, {"error": TEMPERATURE, "error_type": "validation"}),
    ("temperature", 400, "Unsupported value: 'temperature' does not support 0 with this model."),
    ("temperature", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "temperature"], "input": 0}]}),
    ("system", 400, "System role not supported"),
    ("system", 400, "Conversation roles must alternate user/assistant/user/assistant/..."),
    ("system", 500, "Jinja Exception: System role not supported"),
    ("system", 422, {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Input should be 'user'"}]}),
    ("no max_tokens", 422, {"detail": [{"type": "missing", "loc": ["body", "max_tokens"], "msg": "Field required"}]}),
    ("no max_completion_tokens", 400, "max_completion_tokens: field required"),
]


def is_refused(what: str, body: dict[str, Any]) -> bool:
    if what == "system":
        return any(message["role"] == "system" for message in body["messages"])
    return what.removeprefix("no ") not in body if what.startswith("no ") else what in body


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(("what", "status", "content"), ADAPTED)
def test_what_a_server_does_not_take_is_left_out_once_for_the_run(
    endpoint: Endpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    what: str,
    status: int,
    content: Content,
    workers: int,
) -> None:
    endpoint.reply = lambda body: (status, content) if is_refused(what, body) else by_length(body)
    judge = make_judge(endpoint, tmp_path, concurrent_requests=workers)
    assert judge.score(make_samples(12)) == GOOD * 12
    refused = sum(is_refused(what, body) for body in endpoint.bodies)
    assert 1 <= refused <= workers, "only what was on its way already is refused"
    assert len(endpoint.bodies) == 12 + refused
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
    assert all("Be strict, fair and impartial" in text_of(body) for body in endpoint.bodies)


def test_a_server_may_refuse_several_things(endpoint: Endpoint, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Content]:
        if "temperature" in body:
            return 400, "temperature is deprecated"
        if body["messages"][0]["role"] == "system":
            return 400, "Developer instruction is not enabled"
        if "max_tokens" in body:
            return 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return by_length(body) if "max_completion_tokens" in body else (400, "max_tokens is required")

    endpoint.reply = reply
    assert make_judge(endpoint, tmp_path, concurrent_requests=1).score(make_samples(4)) == GOOD * 4
    assert len(endpoint.bodies) == 4 + 4


def test_a_refusal_that_names_a_setting_by_chance_changes_nothing_for_others(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.reply = refusing("Question 0", 400, "Flagged: system, role, temperature, max_tokens required")
    judge = make_judge(endpoint, tmp_path, concurrent_requests=1)
    assert judge.score(make_samples(3))[3:] == GOOD * 2
    assert endpoint.bodies[-1]["temperature"] == 0
    assert endpoint.bodies[-1]["messages"][0]["role"] == "system"
    assert judge.describe()["unreadable_reasons"] == {"content filter": 1}


ENDS: list[tuple[int, Content, type[AlignError], str]] = [
    (401, "Incorrect API key provided", ConfigError, "answers 401: Incorrect API key"),
    (401, f"Incorrect API key provided: {KEY}", ConfigError, "provided: ***;"),
    (402, "Insufficient Balance", ConfigError, "Insufficient Balance"),
    (403, "Your country is not served", ConfigError, "country"),
    (404, "The model `judge-model` does not exist", ConfigError, "does not exist"),
    (400, "Model not loaded", ConfigError, "Model not loaded"),
    (405, b"<html><body>Method Not Allowed</body></html>", ConfigError, "405: Method Not Allowed"),
    (429, {"error": {"message": "Quota is used up.", "code": "insufficient_quota"}}, ConfigError, "Quota is used up"),
    (429, "Slow down", StoppedEarly, "Slow down"),
    (500, "broken", StoppedEarly, "broken"),
    (503, b"<html><h1>503</h1> no server is available</html>", StoppedEarly, "no server is available"),
    (200, b"<html><h1>Welcome</h1></html>", ConfigError, "does not return a chat completion"),
    (200, b'{"object": "list"}', ConfigError, "does not return a chat completion"),
    (302, b"", ConfigError, "302"),
]


@pytest.mark.parametrize(("status", "content", "kind", "words"), ENDS)
def test_what_no_question_survives_ends_the_run_at_once(
    endpoint: Endpoint, tmp_path: Path, status: int, content: Content, kind: type[AlignError], words: str
) -> None:
    endpoint.reply = lambda body: (status, content)
    with pytest.raises(kind) as error:
        make_judge(endpoint, tmp_path, concurrent_requests=1).score(make_samples(20))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)
    assert "judge.base_url" in str(error.value)
    assert len(endpoint.bodies) <= 2, "the question, and a harmless one"


def test_every_question_refused_is_no_result(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = refusing("Question", 400, "maximum context length is 512 tokens")
    with pytest.raises(ConfigError, match=r"every question was refused.*too long for the judge: 400: maximum context"):
        make_judge(endpoint, tmp_path).score(make_samples(3))


def test_verdicts_are_kept_if_a_key_ends_in_the_middle(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = refusing("Question 4", 401, "expired")
    with pytest.raises(ConfigError, match="401: expired"):
        make_judge(endpoint, tmp_path, concurrent_requests=3).score(make_samples(6))
    kept = len((tmp_path / "verdicts.jsonl").read_text().splitlines())
    assert kept >= 4
    endpoint.reply, before = by_length, len(endpoint.bodies)
    assert make_judge(endpoint, tmp_path).score(make_samples(6)) == GOOD * 6
    assert len(endpoint.bodies) - before == 6 - kept


def test_the_wait_that_a_server_asks_for_is_kept(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", waits.append)
    endpoint.headers["Retry-After"] = "7"
    endpoint.reply = lambda body: (429, "busy") if len(endpoint.bodies) < 3 else by_length(body)
    assert make_judge(endpoint, tmp_path, retries=2).score(make_samples(1)) == GOOD
    assert waits == [7.0, 7.0]


def verdict_for(body: dict[str, Any]) -> str:
    text = by_length(body)[1]
    assert isinstance(text, str)
    return text


UNREAD: list[tuple[Content, str]] = [
    (completion("Assistant A: 9\nAssistant B: 9\nAssistant C: 1", "length"), "cut at the server's limit of a reply"),
    (completion(None), "empty reply"),
    (completion(" "), "empty reply"),
    (completion(None, reasoning_content="Assistant A: 9\nAssistant B: 9\nAssistant C: 9"), "empty reply"),
    (completion(None, tool_calls=[]), "empty reply"),
    (completion(None, refusal="I cannot judge this."), "no readable scores"),
    ({**completion("Fine."), "usage": None}, "no readable scores"),
    ({**completion("Fine."), "usage": {"prompt_tokens": None}}, "no readable scores"),
]


@pytest.mark.parametrize(("content", "problem"), UNREAD)
def test_replies_without_a_whole_verdict_are_asked_for_again(
    endpoint: Endpoint, tmp_path: Path, content: Content, problem: str
) -> None:
    endpoint.reply = refusing("Question 0", 200, content)
    judge = make_judge(endpoint, tmp_path)
    assert judge.score(make_samples(2))[3:] == GOOD
    assert judge.describe()["unreadable_reasons"] == {problem: 1}
    asked = [body for body in endpoint.bodies if "Question 0" in text_of(body)]
    assert len(asked) == served_model.READING_ATTEMPTS
    assert all(message["content"].strip() for body in asked for message in body["messages"])
    assert "The scores could not be read" in text_of(asked[-1])


def test_reasoning_is_neither_read_nor_sent_back(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda body: (
        by_length(body)
        if "could not be read" in text_of(body)
        else (200, "<think>Assistant A: 9\nAssistant B: 9\nAssistant C: 9</think>Let me see.")
    )
    assert make_judge(endpoint, tmp_path).score(make_samples(1)) == GOOD
    assert "think" not in text_of(endpoint.bodies[-1])
    assert endpoint.bodies[-1]["messages"][2] == {"role": "assistant", "content": "Let me see."}


def test_a_reply_in_parts_is_its_text(endpoint: Endpoint, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Content]:
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Assistant A: 9"}]}
        return 200, completion([thinking, {"type": "text", "text": verdict_for(body)}])

    endpoint.reply = reply
    assert make_judge(endpoint, tmp_path).score(make_samples(2)) == GOOD * 2


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "http://host:port/v1", "ftp://host/v1", "v1"])
def test_what_is_no_address_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="judge.base_url=.*: not an address such as"):
        served_model_judge(JudgeSection(JudgeKind.openai, "m", url), tmp_path, 0)


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_said_but_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY contains") as error:
        served_model_judge(JudgeSection(JudgeKind.openai, "m"), tmp_path, 0)
    assert key.strip() not in str(error.value)


def test_a_name_that_nobody_has_and_a_server_without_tls_end_the_run(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.url = endpoint.url.replace("http", "https")
    with pytest.raises(ConfigError, match=r"judge\.base_url"):
        make_judge(endpoint, tmp_path).score(make_samples(1))

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    section = JudgeSection(JudgeKind.openai, "m", "http://judge.invalid/v1", retries=0)
    with pytest.raises(ConfigError, match="cannot be reached: .*Name or service not known"):
        served_model_judge(section, tmp_path, 0).score(make_samples(1))
