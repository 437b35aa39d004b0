"""Classify errors of a chat completions endpoint by what they concern."""

import enum
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any

LONGEST_WORDS = 300
_QUOTA = re.compile(r"insufficient[_ ](?:quota|balance|credits?)|billing_(?:hard_limit_reached|not_active)")
_FILTER = re.compile(r"content.?(?:filter|policy|management)|moderat|flagged|safety|guardrail")
_TOO_LONG = re.compile(r"context.?(?:length|window|size)|too (?:long|large)|maximum.{0,40}tokens")


class Scope(enum.Enum):
    """What an error concerns, as far as the error itself shows."""

    run = "every question: wrong key, model or address, or no quota"
    forbidden = "the question or the key"
    question = "the question or the form of every request"
    failure = "a persistent failure, of this question or of the server"
    moment = "a busy server"


def scope_of(error: Exception) -> Scope:
    """Return the scope of an error of the openai client."""
    status, text = getattr(error, "status_code", None), words_of(error).lower()
    code = f"{getattr(error, 'code', '')} {getattr(error, 'type', '')} {text}"
    if status in (401, 402, 404, 405, 410) or _QUOTA.search(code):
        return Scope.run
    if status is None:
        return Scope.run if any(map(_is_wrong_address, _causes(error))) else Scope.failure
    if status in (429, 502, 503) and not ("too large" in text and status == 429):
        return Scope.moment
    if status == 403:
        return Scope.forbidden
    return Scope.failure if status >= 500 or status in (408, 409) else Scope.question


def problem_of(error: Exception) -> str:
    """Return a short reason why one question got no answer."""
    status, text = getattr(error, "status_code", None), words_of(error).lower()
    code = f"{getattr(error, 'code', '')} {text}".lower()
    if status is None:
        return "no reply in time" if "Timeout" in type(error).__name__ else "connection lost"
    if _FILTER.search(code):
        return "content filter"
    return "too long for the judge" if status == 413 or _TOO_LONG.search(code) else f"HTTP {status}"


def words_of(error: Exception) -> str:
    """Return the server's own message, or the cause of a lost connection."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = next((body[name] for name in ("message", "error", "detail") if body.get(name)), body)
    status = getattr(error, "status_code", None)
    said = body or error.__cause__ or error
    return f"{status}: {said}" if status else str(said)


def shortened(words: str) -> str:
    """Return `words` on one line, without HTML tags and at most LONGEST_WORDS characters long."""
    line = " ".join(re.sub(r"<[/!]?[a-zA-Z][^<>]*>", " ", words).split())
    return line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]}..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_wrong_address(error: BaseException) -> bool:
    """Return whether the host is unknown, has no valid TLS, or redirects in a loop."""
    if isinstance(error, socket.gaierror):
        return error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    if isinstance(error, ssl.SSLError):
        reason: Any = error.reason
        return isinstance(error, ssl.SSLCertVerificationError) or reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST")
    return type(error).__name__ == "TooManyRedirects"
