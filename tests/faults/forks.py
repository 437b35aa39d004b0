"""Run whole commands in forks of a server process that has imported everything.

Commands start at once this way, and can be killed. Run as a module, this file is the server: it reads
one JSON request a line and writes one JSON reply a line. A request may ask for several ranks with
rank variables as torchrun sets them, for SIGKILL or another signal after some seconds, and for a disk
that fails (see `disk`).
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.preloaded import import_everything, python
from tests.support import free_ports

NEVER = 1 << 40
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Request:
    """A command: its words, its ranks, and the faults to inject."""

    words: list[str]
    said: str
    """File for the output of all ranks."""
    world: int = 1
    signal_after_seconds: float | None = None
    signal_number: int = signal.SIGKILL
    victims: list[int] | None = None
    """Ranks that get the signal; None for all."""
    disk: tuple[str, int, int, int] | None = None
    """Folder, number of the first change that fails, error number, and how many changes fail."""
    sabotage: tuple[str, list[Any]] | None = None
    """A function of `tests.faults.sabotage`, which every rank calls first, and its arguments."""


@dataclass(frozen=True)
class Ended:
    """The result of a command: exit codes, output of all ranks, and number of file changes by rank 0."""

    codes: list[int]
    said: str
    changes: int
    seconds: float

    @property
    def code(self) -> int:
        """The exit code of rank 0."""
        return self.codes[0]


class Forks:
    """Run commands of offline-align in forks of one server."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, engine: bool = False) -> None:
        """Start the server; `engine` installs the stand-in for Transformer Engine (`tests.engine_on_cpu`)."""
        self._said = folder / "said"
        # One thread a rank: many ranks share few cores, and results do not depend on the number of cores.
        more = {"OMP_NUM_THREADS": "1", **(environment or {})}
        # Transformer Engine, and libraries to preload, must be there before the first import.
        interpreter = sys.executable if engine or environment else python()
        self._server = subprocess.Popen(
            [interpreter, "-m", "tests.faults.forks", *(["engine"] if engine else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | more,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait()

    def run(self, words: list[str], **more: Any) -> Ended:
        """Run a command to its end; `more` are fields of `Request`."""
        request = Request(words, str(self._said), **more)
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(request)) + "\n")
        self._server.stdin.flush()
        codes, changes, seconds = json.loads(self._server.stdout.readline())
        return Ended(codes, self._said.read_text(errors="replace"), changes, seconds)


def _serve(requests: IO[str], replies: IO[str], engine: bool) -> None:
    if engine:
        from tests import engine_on_cpu

        # Before megatron is imported, because it looks for Transformer Engine at import.
        engine_on_cpu.install()
    import_everything()
    from offline_align.distributed import setup

    # One thread a rank, however many cores there are: the number of threads may change the last bit of a sum.
    setup._cores = lambda: 1
    for line in requests:
        request = Request(**json.loads(line))
        Path(request.said).write_bytes(b"")
        reading, writing = os.pipe()
        started = time.monotonic()
        ranks = _fork(request, writing)
        os.close(writing)
        codes = _wait(request, ranks)
        seconds = time.monotonic() - started
        changes = int(os.fdopen(reading).read() or -1)
        replies.write(json.dumps([codes, changes, seconds]) + "\n")
        replies.flush()


def _fork(request: Request, writing: int) -> list[int]:
    (port,) = free_ports(1)
    ranks = []
    for rank in range(request.world):
        child = os.fork()
        if child == 0:
            if request.world > 1:
                sizes = {"WORLD_SIZE": request.world, "LOCAL_WORLD_SIZE": request.world}
                place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in (sizes | place).items()})
            os._exit(_command(request, rank, writing))
        ranks.append(child)
    return ranks


def _wait(request: Request, ranks: list[int]) -> list[int]:
    """Send the signal when it is due, and return the exit codes.

    As a launcher does, kill the other ranks at once if a rank was killed, and after a grace period
    if a rank has failed.
    """
    victims = [ranks[k] for k in request.victims or range(len(ranks))]
    due = None if request.signal_after_seconds is None else time.monotonic() + request.signal_after_seconds
    codes: dict[int, int] = {}
    last_moment = float("inf")
    while len(codes) < len(ranks):
        for rank in (r for r in ranks if r not in codes):
            done, status = os.waitpid(rank, os.WNOHANG)
            if done:
                code = codes[rank] = os.waitstatus_to_exitcode(status)
                if code not in (0, 75):
                    moment = 0.0 if code < 0 else _GRACE_SECONDS
                    last_moment = min(last_moment, time.monotonic() + moment)
        if due is not None and time.monotonic() >= due:
            _signal([r for r in victims if r not in codes], request.signal_number)
            due = None
        if time.monotonic() >= last_moment:
            _signal([r for r in ranks if r not in codes], signal.SIGKILL)
        time.sleep(0.002)
    return [codes[rank] for rank in ranks]


def _signal(ranks: list[int], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def _command(request: Request, rank: int, writing: int) -> int:
    from offline_align.__main__ import run

    file = os.open(request.said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    library: Any = ctypes.CDLL(os.environ["FAILING_DISK"]) if "FAILING_DISK" in os.environ else None
    if library is not None and request.disk is not None:
        folder, first, error, times = request.disk
        library.fail_from(folder.encode(), ctypes.c_long(first), error, ctypes.c_long(times))
    if request.sabotage is not None:
        from tests.faults import sabotage

        name, arguments = request.sabotage
        getattr(sabotage, name)(*arguments)
    code = run(request.words)
    if library is not None and rank == 0:
        library.changes.restype = ctypes.c_long
        os.write(writing, str(library.changes()).encode())
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout, engine=sys.argv[1:] == ["engine"])
