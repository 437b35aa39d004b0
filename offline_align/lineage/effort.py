"""Measure what a run costs: the time of its commands over all attempts, split into parts.

A command counts from the start of its process, so imports, loading, waiting and saves are included.
`part` names what the time of a block is spent on; of nested parts the innermost counts. Inside
`recorded`, the attempts of a run are kept in `effort.json` in its folder, which is updated every
few seconds, so a kill loses only the last seconds. The manifest of the finished run contains the
total.
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
"""The part for all other time: imports, content keys, rendezvous, building the model."""
_LAUNCHED = "offline-align-"
logger = logging.getLogger(__name__)


class _Clock:
    """The seconds of one command, each counted for one part."""

    def __init__(self, started: float) -> None:
        self._since, self._part = started, START
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self.ranks, self.device = 1, "cpu"

    def switch(self, part: str) -> str:
        """Count for `part` from now on, and return the previous part."""
        with self._lock:
            self._update()
            before, self._part = self._part, part
            return before

    def attempt(self) -> dict[str, Any]:
        """Return the record of this attempt so far: ranks, device and seconds by part."""
        with self._lock:
            self._update()
            return {"ranks": self.ranks, "device": self.device, "parts": dict(self._seconds)}

    def _update(self) -> None:
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._since = now


class _Record:
    """The attempts of one run, stored in its folder."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        # The file may also have attempts with other settings, which were refused. They are kept
        # apart by their keys.
        self._runs = _read(path)
        self.earlier = self._runs.get(key, [])
        self.in_manifest = False
        """Whether the manifest contains these attempts, so the file is no longer needed."""

    def write(self) -> None:
        """Write the file; a disk error is only logged, because it must not end the run."""
        runs = self._runs | {self.key: [*self.earlier, _clock.attempt()]}
        try:
            write_atomically(self.path, f"{json.dumps(runs)}\n".encode())
        except StorageError as error:
            logger.debug("%s", error)


_clock = _Clock(time.monotonic())
_record: _Record | None = None


def begin(whole_process: bool) -> None:
    """Start to count a command: from now, or from the start of its process if that runs nothing else.

    Ranks that this program's own launcher has started count from the start of the launcher.
    """
    global _clock
    process = os.getppid() if started_by_this_program() else os.getpid()
    age = seconds_since_birth(process) if whole_process else 0.0
    _clock = _Clock(time.monotonic() - age)


def started_by_this_program() -> bool:
    """Return whether this process is a rank that this program's own launcher has started."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "") == f"{_LAUNCHED}{os.getppid()}"


def launch_name() -> str:
    """Return the torchrun run id by which ranks recognise this process as their launcher."""
    return f"{_LAUNCHED}{os.getpid()}"


def used(ranks: int, device: str) -> None:
    """Record how many ranks this command has, and on what device."""
    _clock.ranks, _clock.device = ranks, device


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Count the time of the block for `name`, except for parts inside it."""
    before = _clock.switch(name)
    try:
        yield
    finally:
        _clock.switch(before)


@contextlib.contextmanager
def recorded(run_dir: Path, key: str) -> Iterator[None]:
    """Keep the effort of a run in its folder while the block runs; one run at a time."""
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
        if record.in_manifest:
            forget(run_dir)
        else:
            record.write()


def _beat(record: _Record, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        record.write()


def forget(run_dir: Path) -> None:
    """Remove the file of a finished run."""
    with contextlib.suppress(OSError):
        (run_dir / FILE_NAME).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the attempts in a file by run key; empty if the file is missing or damaged."""
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(path.read_bytes())
        for attempts in found.values():
            _summary(attempts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return found


def for_manifest() -> dict[str, Any]:
    """Return the effort for the manifest that is about to be written; empty outside `recorded`."""
    if _record is None:
        return {}
    _record.in_manifest = True
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
    """Return the rank-seconds in a manifest's `extra`, or None if it has none.

    A manifest of an earlier version has only a part of them, see `is_whole`.
    """
    if is_whole(extra):
        return float(extra["rank_seconds"]["total"])
    seconds, ranks = extra.get("seconds"), extra.get("ranks", 1)
    known = isinstance(seconds, int | float) and isinstance(ranks, int)
    return seconds * ranks if known else None


def is_whole(extra: Mapping[str, Any]) -> bool:
    """Return whether a manifest counts whole commands; earlier versions only counted steps."""
    recorded_parts = extra.get("rank_seconds")
    return isinstance(recorded_parts, Mapping) and isinstance(recorded_parts.get("total"), int | float)


def parts(extra: Mapping[str, Any]) -> dict[str, float]:
    """Return the rank-seconds by part in a manifest's `extra`; empty for an earlier version."""
    return {n: float(s) for n, s in extra["rank_seconds"].items() if n != "total"} if is_whole(extra) else {}


def in_words() -> str:
    """Return the seconds of this command by part, such as `55 s (validation 21, start 14)`."""
    parts = _clock.attempt()["parts"]
    longest = sorted(parts.items(), key=lambda item: -item[1])
    return f"{sum(parts.values()):.0f} s ({', '.join(f'{name} {value:.0f}' for name, value in longest)})"
