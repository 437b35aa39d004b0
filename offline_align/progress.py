"""Show the progress of long work: a live bar on a terminal, or lines in a log."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from offline_align.wording import counted, duration, pace, size

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger(__name__)
_LINE_SECONDS = 15.0
_PATIENCE_SECONDS = 1.0
"""How long work may take before a line says what it is."""
LARGE_BYTES = 1_000_000_000
"""Files of this size are announced before they are read or written."""


class Meter:
    """Count finished units of work and show progress; pass `enabled=False` on all ranks but one.

    `unit` is a plural that ends in s. Work that takes less than `least_seconds` writes no line to a log.
    Otherwise the first unit of work that leaves a line's worth of waiting gets a line, and then there is
    one every 15 s.
    """

    def __init__(
        self, title: str, total: int, unit: str, done: int = 0, enabled: bool = True, least_seconds: float = 0.0
    ) -> None:
        self.title, self.total, self.unit, self._least_seconds = title, total, unit, least_seconds
        self.done = self._first = done
        self._start = self._last_line = time.monotonic()
        self._note = ""
        self._paused_seconds = 0.0
        self._bar = _bar() if enabled and sys.stderr.isatty() else None
        self._lines = enabled and self._bar is None
        self._said = False

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines and kind is None and time.monotonic() - self._start >= self._least_seconds:
            self._line(self._note)

    @property
    def has_begun(self) -> bool:
        """Whether a unit of work has been done since the meter was created."""
        return self.done > self._first

    @property
    def rate(self) -> float:
        """Units a second since the meter was created, without the time in `paused`."""
        return (self.done - self._first) / self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since the meter was created, without the time in `paused`; above 0."""
        return max(time.monotonic() - self._start - self._paused_seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """Expected seconds until the end, at the rate so far; infinite before the first unit."""
        return (self.total - self.done) / self.rate if self.rate > 0 else float("inf")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done and show a short note, such as the current loss."""
        self.done += units
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._tail(note))
        elif self._lines and self._is_due():
            self._line(note)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block, such as a save, out of the rate."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - started

    def _is_due(self) -> bool:
        if self.done >= self.total:
            return False  # the end has a line of its own
        silent = time.monotonic() - self._last_line
        return silent >= _LINE_SECONDS or (not self._said and silent + self.seconds_left >= _LINE_SECONDS)

    def _line(self, note: str) -> None:
        self._last_line, self._said = time.monotonic(), True
        total = counted(self.total, self.unit.removesuffix("s"), self.unit)
        if self.done < self.total:
            left = f", about {duration(self.seconds_left)} left" if self.has_begun else ""
            logger.info("%s: %s of %s, %s%s", self.title, f"{self.done:,}", total, self._tail(note), left)
        else:
            took = duration(time.monotonic() - self._start)
            logger.info("%s: all %s, in %s, %s", self.title, total, took, self._tail(note))

    def _tail(self, note: str) -> str:
        return ", ".join(part for part in (pace(self.rate, self.unit), note) if part)


@contextlib.contextmanager
def announced(work: str, num_bytes: int = 0, enabled: bool = True) -> Iterator[None]:
    """Say what a block does if it lasts longer than a second or moves a gigabyte, and how long it took.

    `work` is a phrase such as `hashing models/base`. The lines are `<work>, 1.2 GB ...` and
    `<work>: took 14 s`.
    """
    if not enabled:
        yield
        return
    what = f"{work}, {size(num_bytes)}" if num_bytes else work
    started = time.monotonic()
    timer = threading.Timer(_PATIENCE_SECONDS, logger.info, ("%s ...", what))
    timer.daemon = True
    if is_large := num_bytes >= LARGE_BYTES:
        logger.info("%s ...", what)
    else:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
    # After an error, the error is the only line.
    seconds = time.monotonic() - started
    if is_large or seconds >= _PATIENCE_SECONDS:
        logger.info("%s: took %s", work, duration(seconds))


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
