"""A chat server for the tests of served judges."""

from collections.abc import Iterator

import pytest

from tests.unit.evaluate.judges.chat_server import KEY, Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint()
    yield endpoint
    endpoint.stop()
