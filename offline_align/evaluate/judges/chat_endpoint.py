"""Ask a chat completions server, and tell refused questions from an unusable server.

A request has model, messages and temperature 0. If the server rejects one of these, the request is
adapted for the rest of the run. A harmless test question shows whether an error concerns one
question or all of them.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from offline_align.errors import AlignError, ConfigError, StoppedEarly
from offline_align.evaluate.judges.endpoint_errors import Scope, problem_of, scope_of, shortened, words_of

if TYPE_CHECKING:
    from openai import APIError, OpenAI

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
HARMLESS: Messages = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Which colour is snow?"},
]
REPLY_TOKENS = 4096
"""Limit of a reply, for servers that require one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The server's reply; `problem` says why `text` cannot hold a verdict, empty if it can."""

    text: str
    problem: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Refused(Exception):
    """The server refuses this question but answers others.

    `problem` names the reason, `words` is the server's message.
    """

    def __init__(self, problem: str, words: str) -> None:
        super().__init__(f"{problem}: {words}")
        self.problem, self.words = problem, words


class NoCompletion(Exception):
    """The server sent something other than a chat completion."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a request that a server accepts."""

    temperature: bool = True
    system: bool = True
    """Whether instructions go in a system message; if not, they start the first user message."""
    limit: str = ""
    """Name of the parameter that limits a reply, if the server requires one."""

    def request(self, messages: Messages) -> dict[str, Any]:
        """Return the arguments of the client's call except the model."""
        if not self.system and messages[0]["role"] == "system":
            head, first, *rest = messages
            messages = [{**first, "content": f"{head['content']}\n\n{first['content']}"}, *rest]
        settings: dict[str, Any] = {"temperature": 0} if self.temperature else {}
        return {"messages": messages, **settings, **({self.limit: REPLY_TOKENS} if self.limit else {})}

    def adapted(self, words: str) -> "Form | None":
        """Return the form to try after this error message, or None if there is none."""
        text = words.lower()
        if self.temperature and "temperature" in text:
            return replace(self, temperature=False)
        if self.limit != "max_completion_tokens" and "max_completion_tokens" in text:
            return replace(self, limit="max_completion_tokens")
        if not self.limit and "max_tokens" in text and any(word in text for word in ("required", "missing")):
            return replace(self, limit="max_tokens")
        if self.system and any(word in text for word in ("system", "role", "developer")):
            return replace(self, system=False)
        return None


@dataclass(slots=True)
class ChatEndpoint:
    """Asks `model` through the openai package's client, which retries failed requests."""

    client: "OpenAI"
    model: str
    retries: int
    _form: Form = Form()
    _answers: bool = False
    """Whether the server has returned any completion."""
    _end: AlignError | None = None
    """The error that ended the run; no more questions are sent."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, messages: Messages) -> Reply:
        """Return the reply to a question.

        Raises Refused if the server answers other questions but not this one, ConfigError if it
        will answer none, and StoppedEarly if it cannot answer now.
        """
        from openai import APIError

        if self._end is not None:
            raise self._end
        try:
            return self._send_adapted(messages, self.retries)
        except NoCompletion as error:
            if self._answers or self._answers_another():
                return Reply("", f"no chat completion: {self._message(str(error))}")
            self._end = self._unusable(f"does not return a chat completion: {error}")
            raise self._end from error
        except APIError as error:
            meaning = self._meaning(error)
            if isinstance(meaning, AlignError):
                self._end = meaning
            raise meaning from error

    def _meaning(self, error: "APIError") -> Refused | AlignError:
        scope, words = scope_of(error), self._message(words_of(error))
        said = f"answers {words}" if hasattr(error, "status_code") else f"cannot be reached: {words}"
        if scope is Scope.run:
            return self._unusable(said)
        if scope is Scope.question and self._answers:
            return Refused(problem_of(error), words)
        if scope is not Scope.moment and self._answers_another():
            return Refused(problem_of(error), words)
        if scope in (Scope.question, Scope.forbidden):
            return self._unusable(said)
        return StoppedEarly(
            f"judge.base_url={self.client.base_url}: no verdict after {self.retries} retries "
            f"({type(error).__name__}: {words}); run the same command again, the verdicts so far are kept"
        )

    def _unusable(self, words: str) -> ConfigError:
        return ConfigError(
            f"judge.model={self.model}: {self.client.base_url} {self._message(words)}; check judge.model, "
            "judge.base_url, OPENAI_API_KEY and its credit, and run again; the verdicts so far are kept"
        )

    def _message(self, words: str) -> str:
        """Return the server's message on one line, without the API key, which some servers echo."""
        return shortened(words.replace(self.client.api_key, "***"))

    def _answers_another(self) -> bool:
        """Return whether the server answers a harmless question now."""
        from openai import APIError

        try:
            self._send_adapted(HARMLESS, 0)
        except (APIError, NoCompletion):
            return False
        return True

    def _send_adapted(self, messages: Messages, retries: int) -> Reply:
        """Send a question in a form that the server accepts, and keep that form."""
        from openai import APIStatusError

        tried = self._form
        try:
            return self._send(messages, tried, retries)
        except APIStatusError as error:
            refused = error
        with self._lock:
            # Another thread may have found an accepted form in the meantime.
            changed = self._form != tried
            form = self._form if changed else tried.adapted(words_of(refused))
            while form is not None:
                try:
                    reply = self._send(messages, form, retries)
                except APIStatusError as error:
                    refused, form = error, form.adapted(words_of(error))
                    continue
                self._keep(form, refused)
                return reply
        raise refused

    def _keep(self, form: Form, refused: Exception) -> None:
        if form != self._form:
            words = self._message(words_of(refused))
            log.warning("judge.model=%s: switching to %s because the server says: %s", self.model, form, words)
            self._form = form

    def _send(self, messages: Messages, form: Form, retries: int) -> Reply:
        client = self.client.with_options(max_retries=retries)
        try:
            completion = client.chat.completions.create(model=self.model, **form.request(messages))
        except (ValueError, RecursionError) as error:
            # The content type says JSON, but the body is not.
            raise NoCompletion(f"{type(error).__name__}: {error}") from error
        reply = _read(completion)
        self._answers = True
        return reply


def _read(completion: Any) -> Reply:
    """Return the reply in a completion. Raises NoCompletion, or Refused if it was filtered."""
    try:
        choice = completion.choices[0]
        message = choice.message
        content = message.content
    except (AttributeError, IndexError, TypeError) as error:
        raise NoCompletion(str(getattr(completion, "error", None) or completion)) from error
    if choice.finish_reason == "content_filter":
        raise Refused("content filter", str(content or "the reply was withheld"))
    text = _text(content) or str(getattr(message, "refusal", None) or "")
    usage = getattr(completion, "usage", None)
    tokens = [int(getattr(usage, name, None) or 0) for name in ("prompt_tokens", "completion_tokens")]
    if choice.finish_reason == "length":
        return Reply(text, "cut at the server's limit of a reply", *tokens)
    return Reply(text, "" if text.strip() else "empty reply", *tokens)


def _text(content: Any) -> str:
    """Return the text of a message. Some servers send a list of parts; only text parts count."""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(str(part.get("text") or "") for part in parts)
    return str(content or "")
