"""Stop early without losing work: signals and wall-clock limits.

A command runs inside `interruptible`: a stop request ends it at once, wherever it is. That is safe,
because files are replaced whole or not at all. A loop with unsaved results uses `stop_requests`
instead and saves them before it ends.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from offline_align.config.durations import parse_duration
from offline_align.errors import StoppedEarly

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A request to stop: signal handlers set it, and the loop that polls it saves and ends."""

    def __init__(self, max_seconds: float | None = None, started: float | None = None) -> None:
        """Set the limit to `max_seconds` after `started` (monotonic clock), or after now."""
        start = time.monotonic() if started is None else started
        self._deadline = None if max_seconds is None else start + max_seconds
        self._signal: signal.Signals | None = None
        self._process = os.getpid()

    @property
    def reason(self) -> str | None:
        """The signal or limit that requests a stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "trainer.max_time"
        return None

    def expect(self, seconds: float) -> None:
        """Request a stop now if fewer than `seconds`, for the next step and the save, are left."""
        if self._deadline is not None and time.monotonic() + seconds >= self._deadline:
            self._deadline = time.monotonic()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGALRM:
            return  # the limit, which `reason` checks itself
        # A second signal ends the process at once. No file is left half-written, because files are
        # replaced whole. A process forked from this one has nothing to save.
        if self._signal is not None or os.getpid() != self._process:
            _end(number)
        self._signal = signal.Signals(number)


class StopVote:
    """A vote of all ranks on stopping, once a round.

    The result of a round is read one round later, so no rank waits for the work of the newest round
    and all ranks stop after the same one.
    """

    def __init__(self, stop: StopRequest, ranks: "Ranks") -> None:
        self._stop, self._ranks = stop, ranks
        self._newest: Callable[[], bool] | None = None

    def __call__(self) -> bool:
        """Vote in this round, and return whether the previous round decided to stop."""
        before, self._newest = self._newest, self._ranks.any_rank(self._stop.reason is not None)
        return before is not None and before()

    def newest(self) -> bool:
        """Return the decision of the newest round; for use after the last round."""
        return self._newest is not None and self._newest()


# Start of the current command. Limits count from here, so reading data and loading models is
# included.
_started: float | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[str | None], None]]:
    """Raise StoppedEarly inside the block, wherever it is, on SIGTERM, SIGINT, SIGUSR1 or at a limit.

    Yields a function that sets the limit, which counts from the start of the block. While a loop
    inside the block uses `stop_requests`, that loop receives the request instead.
    """
    global _started
    if threading.current_thread() is not threading.main_thread():
        yield lambda max_time: None  # only the main thread receives signals
        return
    process, before = os.getpid(), _started
    _started = started = time.monotonic()
    stopped: list[StoppedEarly] = []

    def leave(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:
            _end(number)
        for again in _SIGNALS:
            signal.signal(again, signal.SIG_DFL)
        name = "trainer.max_time" if number == signal.SIGALRM else signal.Signals(number).name
        stopped.append(StoppedEarly(f"stopped by {name}; finished work is on disk: run the command again"))
        raise stopped[0]

    def limit(max_time: str | None) -> None:
        if max_time is not None:
            left = started + parse_duration(max_time) - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))

    previous = {s: signal.signal(s, leave) for s in (*_SIGNALS, signal.SIGALRM)}
    try:
        yield limit
    except Exception as error:
        # If StoppedEarly was raised inside a library's callback, the library may have replaced it
        # by its own error.
        if stopped and error is not stopped[0]:
            raise stopped[0] from error
        raise
    finally:
        _started = before
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests(max_time: str | None = None) -> Iterator[StopRequest]:
    """Yield a StopRequest, set by SIGTERM, SIGINT, SIGUSR1 or the limit `max_time`."""
    request = StopRequest(parse_duration(max_time) if max_time else None, _started)
    previous = {s: signal.signal(s, request._handle) for s in (*_SIGNALS, signal.SIGALRM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int) -> None:
    """End this process by the signal's default action."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
