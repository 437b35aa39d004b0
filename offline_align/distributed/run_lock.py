"""Lock a run folder for one job: refuse a second job, but replace the lock of a dead one.

The lock is the file `.lock`, which records the host, process and start of its holder. Creating it
is atomic on network storage too. If the holder is on this machine, /proc tells whether it is alive,
so after kill -9 a new job starts at once. A holder on another machine touches the file every few
seconds, so this job watches the file for changes. No clocks are compared.
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
"""If the lock of a holder on another machine does not change for this long, the holder is dead."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """The job that holds a run folder."""

    stage: str
    process: Process
    since: str
    token: str

    @classmethod
    def this_process(cls, stage: str) -> "Holder":
        """Return the holder that this process writes into the lock, with a unique token."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(stage, Process.this(), now, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"`{self.stage}`, {self.process}, since {self.since}"


_UNKNOWN = Holder("?", Process("an unknown host", "", 0, ""), "?", "")


@contextlib.contextmanager
def run_lock(run_dir: Path, stage: str) -> Iterator[None]:
    """Lock `run_dir` while the block runs.

    If the holder is on another machine, this waits for its next heartbeat, a minute at most.
    Raises ConfigError if another job holds the folder, StorageError if it cannot be locked.
    """
    path = run_dir / FILE_NAME
    own = Holder.this_process(stage)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        while (other := _take(path, own)) is not None:
            if not _is_dead(path, other):
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
            with contextlib.suppress(OSError):  # the next job will see that the holder is dead
                path.unlink()


def _take(path: Path, own: Holder) -> Holder | None:
    """Create the lock and return None, or return the current holder if there is one."""
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
    """Remove and log the lock of a dead holder, unless another job has taken it meanwhile."""
    aside = path.with_name(f"{FILE_NAME}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if (_read(aside) or dead).token != dead.token:
            os.link(aside, path)
        else:
            logger.warning("%s: left by a job that has ended (%s): taken over", path, dead)
        aside.unlink()


def _is_dead(path: Path, other: Holder) -> bool:
    """Watch the lock for a minute and return whether its holder sends no heartbeat.

    A holder on this machine is alive: `_take` has already removed the lock of a dead one.
    """
    if other.process.is_here:
        return False
    first, pause = _last_beat(path), BEAT_SECONDS / 5
    logger.warning("%s: held by %s: checking whether that job is alive", path, other)
    # Count pauses and not elapsed time, because this machine may be suspended in between.
    for _ in range(round(SILENT_SECONDS / pause)):
        time.sleep(pause)
        seen = _last_beat(path)
        if seen is None:
            return True  # the holder has just ended
        if seen != first:
            return False
    return True


def _beat(path: Path, own: Holder, ended: threading.Event) -> None:
    """Touch the lock every few seconds; end this process if another job has taken the lock.

    Two jobs must not write into one folder.
    """
    while not ended.wait(BEAT_SECONDS):
        held = _read(path)
        if held is not None and held.token != own.token:
            logger.error("%s: taken over by %s while this job was stopped: this job ends", path, held)
            os._exit(StorageError.exit_code)
        with contextlib.suppress(OSError):
            os.utime(path)


def _last_beat(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opening the file makes NFS fetch its attributes from the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> Holder | None:
    """Return the holder of the lock, or None if there is no lock or it is not readable."""
    try:
        values = json.loads(path.read_bytes())
        return Holder(**values | {"process": Process(**values["process"])})
    except (OSError, ValueError, TypeError, LookupError):
        return None


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Serialise processes of this machine with flock; network storage may not support it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
