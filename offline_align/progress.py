"""Show the progress of long work: a live bar on a terminal, or lines in a log."""

import logging
import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
_LINE_SECONDS = 15.0


class Meter:
    """Count finished units of work and show progress; pass `enabled=False` on all ranks but one.

    Work that takes less than `least_seconds` writes no line to a log.
    """

    def __init__(
        self, title: str, total: int, unit: str, done: int = 0, enabled: bool = True, least_seconds: float = 0.0
    ) -> None:
        self.title, self.total, self.unit, self._least_seconds = title, total, unit, least_seconds
        self.done = self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar = _bar() if enabled and sys.stderr.isatty() else None
        self._lines = enabled and self._bar is None

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._lines and kind is None and time.monotonic() - self._start >= self._least_seconds:
            self._line("")

    @property
    def rate(self) -> float:
        """Units a second since the meter was created."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done and show a short note, such as the current loss."""
        self.done += units
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif self._lines and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._line(note)

    def _line(self, note: str) -> None:
        self._last_line = time.monotonic()
        left = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        eta = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        tail = f", {note}" if note else ""
        logger.info("%s: %d/%d %s, %.1f/s%s%s", self.title, self.done, self.total, self.unit, self.rate, eta, tail)


def _bar() -> Progress:
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
