"""One job in a run folder: the second one is told who is there, and what a dead one has left is taken over.

The lock is a file, `.lock`, with host, process and start of its holder. Its creation is atomic on network storage too.
Whether the holder lives is asked of the system where it is on this machine, so that a job goes on at once after
kill -9. Elsewhere it is watched: a living holder touches its file every few seconds. No clocks are compared.
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from offline_align.distributed.process import Process
from offline_align.errors import ConfigError, StorageError

FILE_NAME = ".lock"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""A holder on another machine that has not touched its file for so long, while it was watched, is dead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run folder."""

    stage: str
    process: Process
    since: str
    token: str

    @classmethod
    def this_process(cls, stage: str) -> "Holder":
        """Return what this process writes into the lock."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(stage, Process.this(), now, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"`{self.stage}`, {self.process}, since {self.since}"


_UNKNOWN = Holder("?", Process("an unknown host", "", 0, ""), "?", "")


@contextlib.contextmanager
def run_lock(run_dir: Path, stage: str) -> Iterator[None]:
    """Hold `run_dir` while the block runs; raises ConfigError where another job has it, StorageError.

    Where the holder is on another machine this watches it, for a beat if it lives and for a minute if not.
    """
    path = run_dir / FILE_NAME
    own = Holder.this_process(stage)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while (other := _take(path, own)) is not None:
            if not _falls_silent(path, other):
                raise ConfigError(
                    f"run.dir={run_dir}: is in use by another job ({other}); wait for it or stop it, "
                    f"or choose another folder"
                )
            with _one_at_a_time(run_dir):
                _clear(path, other)
    except OSError as error:
        raise StorageError(f"{error.filename or path}: cannot be locked: {error.strerror or error}") from error
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, own, ended), name="run lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        if _read(path) == own:
            with contextlib.suppress(OSError):  # the next job will find its holder dead
                path.unlink()


def _take(path: Path, own: Holder) -> Holder | None:
    """Create the lock and return None, or return its holder."""
    with _one_at_a_time(path.parent):
        other = _read(path)
        if other is not None and other.process.has_ended:
            _clear(path, other)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return _read(path) or _UNKNOWN
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(own), file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return None


def _clear(path: Path, dead: Holder) -> None:
    """Remove the lock of a dead holder, and say so; a lock that somebody else has taken meanwhile stays."""
    aside = path.with_name(f"{FILE_NAME}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if (_read(aside) or dead).token != dead.token:
            os.link(aside, path)
        else:
            logger.warning("%s: was left by a job that is gone (%s): taken over", path, dead)
        aside.unlink()


def _falls_silent(path: Path, other: Holder) -> bool:
    """Watch a holder: whether it shows no sign of life for a minute. One on this machine lives, or was cleared."""
    if other.process.is_here:
        return False
    first, pause = _last_beat(path), BEAT_SECONDS / 5
    logger.warning("%s: held by %s: watching whether it lives", path, other)
    for _ in range(round(SILENT_SECONDS / pause)):  # looks are counted, not time, in which this machine may have slept
        time.sleep(pause)
        seen = _last_beat(path)
        if seen is None:
            return True  # it has just ended
        if seen != first:
            return False
    return True


def _beat(path: Path, own: Holder, ended: threading.Event) -> None:
    """Show that this process lives; where its lock was taken over, end it at once: two must not write."""
    while not ended.wait(BEAT_SECONDS):
        held = _read(path)
        if held is not None and held.token != own.token:
            logger.error("%s: taken over by %s, while this job stood still: it ends here", path, held)
            os._exit(StorageError.exit_code)
        with contextlib.suppress(OSError):
            os.utime(path)


def _last_beat(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opening makes network storage ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> Holder | None:
    """Return who holds the lock; None where nobody does or it is not readable."""
    try:
        values = json.loads(path.read_bytes())
        return Holder(**values | {"process": Process(**values["process"])})
    except (OSError, ValueError, TypeError, LookupError):
        return None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let processes of this machine come one after another; network storage may not know such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
