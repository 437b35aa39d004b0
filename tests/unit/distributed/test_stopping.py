"""Signals and limits set a flag; handlers are put back."""

import os
import signal

import pytest

from offline_align.distributed.stopping import parse_duration, stop_requests
from offline_align.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("3h50m", 13800), ("01:30:00", 5400), ("1d", 86400), ("0.5", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3x", "1:2", "-5", "h"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="trainer.max_time"):
        parse_duration(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_a_reason_and_handlers_return(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        reason: str | None = stop.reason
        assert reason == number.name
    assert signal.getsignal(number) is before


def test_a_limit_is_kept_with_time_in_hand() -> None:
    with stop_requests("100") as stop:
        stop.expect(50)
        assert stop.reason is None
        stop.expect(200)
        assert stop.reason == "trainer.max_time"
