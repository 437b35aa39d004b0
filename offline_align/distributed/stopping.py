"""Stop early without losing work: signals and wall-clock limits.

A command runs inside `interruptible`: a stop request ends it at once, wherever it is. That is safe,
because files are replaced whole or not at all. A loop with unsaved results uses `stop_requests`
instead and saves them before it ends.

Python runs signal handlers only between two of its own operations, which can be minutes apart if a
step runs on the CPU. So a thread hears of each signal at once: it says what the command finishes
first, and a second signal ends the process even if the handler has no turn.
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
# A command that ends within this time after a signal needs no word that it is about to.
_PATIENCE_SECONDS = 1.0
# How long the handler of a second signal has until the listening thread ends the process.
_LAST_SECONDS = 1.0


class StopRequest:
    """A request to stop: signal handlers set it, and the loop that polls it saves and ends.

    `doing` is what the loop finishes before it ends, such as `step 12`; the loop keeps it up to date.
    """

    def __init__(self, max_seconds: float | None = None, started: float | None = None, doing: str = "") -> None:
        """Set the limit to `max_seconds` after `started` (monotonic clock), or after now."""
        self.doing = doing
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


class _Listener:
    """A thread that hears of each signal at once, while the main thread may be inside a library."""

    def __init__(self) -> None:
        self._ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        self._mouth = mouth
        self._before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        self.heard = 0
        self.speaks = True
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """End the thread, and give signals back to whoever had them."""
        self._closed.set()
        signal.set_wakeup_fd(self._before)
        os.close(self._mouth)

    def _listen(self) -> None:
        with os.fdopen(self._ear, "rb", buffering=0) as ear:
            while numbers := ear.read(1):
                if numbers[0] in _SIGNALS and not self._closed.is_set():
                    self._answer(numbers[0])

    def _answer(self, number: int) -> None:
        self.heard += 1
        name = signal.Signals(number).name
        if self.heard > 1:
            if self.speaks:  # a launcher ends with its ranks
                self._later(_LAST_SECONDS, lambda: os._exit(128 + number))
        elif not self.speaks:
            return
        elif _request is not None:
            _say(f"{name}: finishing {_request.doing or 'what was begun'}; again to stop at once")
        else:
            self._later(_PATIENCE_SECONDS, lambda: _say(f"{name}: stopping"))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after some seconds, unless the command has ended by then."""

        def wait() -> None:
            if not self._closed.wait(seconds):
                act()

        threading.Thread(target=wait, name="signals", daemon=True).start()


def _say(text: str) -> None:
    """Write a line to standard error, on one rank. `print` could meet a lock that the main thread holds."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"offline-align: {text}\n".encode())


def _stop_listening() -> None:
    """Forget the listener in a forked process, whose signals are not ours."""
    with contextlib.suppress(ValueError):  # forked from another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_stop_listening)

# The request of the loop that runs, for the listening thread.
_request: StopRequest | None = None
_listener: _Listener | None = None


def leave_words_to_the_ranks() -> None:
    """Say nothing about signals in this process, because the ranks that it has started do."""
    if _listener is not None:
        _listener.speaks = False


def signals_heard() -> int:
    """Return how many stop signals the current command has got."""
    return _listener.heard if _listener is not None else 0


# Start of the current command. Limits count from here, so reading data and loading models is
# included.
_started: float | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[str | None], None]]:
    """Raise StoppedEarly inside the block, wherever it is, on SIGTERM, SIGINT, SIGUSR1 or at a limit.

    Yields a function that sets the limit, which counts from the start of the block. While a loop
    inside the block uses `stop_requests`, that loop receives the request instead.
    """
    global _started, _listener
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

    outer = _listener
    _listener = _Listener()
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
        _listener.close()
        _listener = outer


@contextlib.contextmanager
def stop_requests(max_time: str | None = None, doing: str = "") -> Iterator[StopRequest]:
    """Yield a StopRequest, set by SIGTERM, SIGINT, SIGUSR1 or the limit `max_time`.

    `doing` is what the loop finishes first, see `StopRequest`.
    """
    global _request
    outer, request = _request, StopRequest(parse_duration(max_time) if max_time else None, _started, doing)
    _request = request
    previous = {s: signal.signal(s, request._handle) for s in (*_SIGNALS, signal.SIGALRM)}
    try:
        yield request
    finally:
        _request = outer
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int) -> None:
    """End this process by the signal's default action."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
