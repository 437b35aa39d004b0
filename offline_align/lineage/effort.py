"""What a run costs: the time of its whole commands, over all attempts, by part.

A command counts from the start of its process, so that imports, loading, waiting and saves are in it. `part` names what
the time between goes to; innermost counts. While a run is `recorded`, its attempts stand in `effort.json` of its
folder, brought up to date every few seconds, so that a kill loses no more than those. The manifest takes them over.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline_align.distributed.process import seconds_since_birth
from offline_align.errors import StorageError
from offline_align.lineage.files import write_atomically

FILE_NAME = "effort.json"
BEAT_SECONDS = 5.0
START = "start"
"""Everything before, between and after the named parts: imports, keys, meeting of the ranks, building of the model."""
_LAUNCHED = "offline-align-"
logger = logging.getLogger(__name__)


class _Clock:
    """The seconds of one command, each given to one part."""

    def __init__(self, started: float) -> None:
        self._since, self._part = started, START
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self.ranks, self.device = 1, "cpu"

    def switch(self, part: str) -> str:
        """Count for `part` from now on; returns the part until now."""
        with self._lock:
            self._bring_up_to_date()
            before, self._part = self._part, part
            return before

    def attempt(self) -> dict[str, Any]:
        """Return what has been used so far."""
        with self._lock:
            self._bring_up_to_date()
            return {"ranks": self.ranks, "device": self.device, "parts": dict(self._seconds)}

    def _bring_up_to_date(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._since = now


class _Record:
    """The attempts of one run, in its folder."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        # A run with other settings may have been asked for in between, and refused.
        self._runs = _read(path)
        self.earlier = self._runs.get(key, [])
        self.taken_over = False
        """Whether the manifest has it."""

    def write(self) -> None:
        """Bring the file up to date; a disk that fails is not worth a second error."""
        runs = self._runs | {self.key: [*self.earlier, _clock.attempt()]}
        try:
            write_atomically(self.path, f"{json.dumps(runs)}\n".encode())
        except StorageError as error:
            logger.debug("%s", error)


_clock = _Clock(time.monotonic())
_record: _Record | None = None


def begin(whole_process: bool) -> None:
    """Count a command from now, or from the start of the process that is there for it alone.

    Ranks that this program's own launcher has started count from the start of that one.
    """
    global _clock
    launcher = os.environ.get("TORCHELASTIC_RUN_ID", "")
    by_us = launcher == f"{_LAUNCHED}{os.getppid()}"
    age = seconds_since_birth(os.getppid() if by_us else os.getpid()) if whole_process else 0.0
    _clock = _Clock(time.monotonic() - age)


def launch_name() -> str:
    """Return the name of the ranks that this process launches, by which they know it."""
    return f"{_LAUNCHED}{os.getpid()}"


def used(ranks: int, device: str) -> None:
    """Say how many processes this command has, and on what device."""
    _clock.ranks, _clock.device = ranks, device


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count the time of the block for `name`, but for parts inside it."""
    before = _clock.switch(name)
    try:
        yield
    finally:
        _clock.switch(before)


@contextlib.contextmanager
def recorded(run_dir: Path, key: str) -> Iterator[None]:
    """Keep the effort of the run with this key in its folder while the block runs; for one process at a time."""
    global _record
    record = _record = _Record(run_dir / FILE_NAME, key)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(record, ended), name="effort", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        _record = None
        if record.taken_over:
            forget(run_dir)
        else:
            record.write()


def _beat(record: _Record, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        record.write()


def forget(run_dir: Path) -> None:
    """Remove the file of a run that is finished."""
    with contextlib.suppress(OSError):
        (run_dir / FILE_NAME).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the attempts in a file by the key of their run; none where there is no such file, or not a whole one."""
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(path.read_bytes())
        for attempts in found.values():
            _summary(attempts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return found


def for_manifest() -> dict[str, Any]:
    """Return what the manifest, which is about to be written, says of the effort; nothing where none is recorded."""
    if _record is None:
        return {}
    _record.taken_over = True
    return _summary([*_record.earlier, _clock.attempt()])


def _summary(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    parts: dict[str, float] = {}
    seconds = rank_seconds = 0.0
    for attempt in attempts:
        whole = sum(attempt["parts"].values())
        seconds, rank_seconds = seconds + whole, rank_seconds + whole * attempt["ranks"]
        for name, value in attempt["parts"].items():
            parts[name] = parts.get(name, 0.0) + value * attempt["ranks"]
    last = attempts[-1] if attempts else {"ranks": 1, "device": "cpu"}
    return {
        "seconds": round(seconds, 3),
        "ranks": last["ranks"],
        "device": last["device"],
        "rank_seconds": {"total": round(rank_seconds, 3)} | {name: round(value, 3) for name, value in parts.items()},
        "attempts": len(attempts),
    }


def rank_seconds(extra: Mapping[str, Any]) -> float | None:
    """Return the seconds of all ranks that a manifest records in its `extra`, or None where it records none.

    Of a run of an earlier version they are not all of them, see `is_whole`.
    """
    if is_whole(extra):
        return float(extra["rank_seconds"]["total"])
    seconds, ranks = extra.get("seconds"), extra.get("ranks", 1)
    known = isinstance(seconds, int | float) and isinstance(ranks, int)
    return seconds * ranks if known else None


def is_whole(extra: Mapping[str, Any]) -> bool:
    """Whether a manifest records whole commands. Earlier versions did not: of training they counted steps alone."""
    recorded_parts = extra.get("rank_seconds")
    return isinstance(recorded_parts, Mapping) and isinstance(recorded_parts.get("total"), int | float)


def parts(extra: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of all ranks by part that a manifest records in its `extra`; none of an earlier version."""
    return {n: float(s) for n, s in extra["rank_seconds"].items() if n != "total"} if is_whole(extra) else {}


def in_words() -> str:
    """Return the seconds of this command so far and its longest parts: `55 s (validation 21, start 14, steps 12)`."""
    parts = _clock.attempt()["parts"]
    longest = sorted(parts.items(), key=lambda item: -item[1])
    return f"{sum(parts.values()):.0f} s ({', '.join(f'{name} {value:.0f}' for name, value in longest)})"
