"""Stopping early without losing work: signals and wall-clock limits set a flag that every loop asks for."""

import contextlib
import re
import signal
import time
from collections.abc import Iterator
from types import FrameType

from offline_align.errors import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class StopRequest:
    """Why this rank should stop, if it should; a handler only sets the flag, the loop saves and leaves."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        """The signal or limit that asks for an end, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "trainer.max_time"
        return None

    def expect(self, seconds: float) -> None:
        """Keep `seconds` in hand before the limit, for the step under way and the save after it."""
        if self._deadline is not None and time.monotonic() + seconds >= self._deadline:
            self._deadline = time.monotonic()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            # Asked twice: leave at once; files are replaced whole, so nothing half-written can be mistaken for one.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number)


@contextlib.contextmanager
def stop_requests(max_time: str | None = None) -> Iterator[StopRequest]:
    """Listen for SIGTERM, SIGINT, SIGUSR1 and the limit `max_time` while the block runs."""
    request = StopRequest(parse_duration(max_time) if max_time else None)
    previous = {s: signal.signal(s, request._handle) for s in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parse_duration(text: str, key: str = "trainer.max_time") -> float:
    """Return seconds for `3h50m`, `90s`, `HH:MM:SS` or a plain number; raises ConfigError naming `key`."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"\d+:\d{1,2}:\d{1,2}", text):
        hours, minutes, seconds = (int(p) for p in text.split(":"))
        return hours * 3600 + minutes * 60 + seconds
    if re.fullmatch(r"(\d+[dhms])+", text):
        return float(sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([dhms])", text)))
    raise ConfigError(f"{key}={text}: not a duration; write 3h50m, 03:50:00 or seconds")
