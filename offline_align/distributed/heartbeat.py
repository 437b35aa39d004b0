"""Ranks that have died, stand still or fail are noticed by the others, in whatever they wait, and named.

A rank that is killed breaks the connections of gloo, not those of NCCL, and a rank that stands still breaks none: the
others would wait for the half hour that a collective may take. So every rank beats from a thread of its own, by a
counter in the store that the ranks have met in, and listens to the rank after it. Work of any length is no silence.

A rank that fails says so in the store, with its exit code. The others end with the same code, unless they leave by
themselves, as they do where all have met the error together.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from offline_align.distributed.process import Process
from offline_align.distributed.teardown import before_teardown, exit_now
from offline_align.errors import AlignError, FailedOnMainRank, StoppedEarly, exit_code_of

logger = logging.getLogger(__name__)
_MOST_SECONDS_BETWEEN_BEATS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05
_LEFT = b"left"


@contextlib.contextmanager
def heartbeat(silent_seconds: float, place: str) -> Iterator[None]:
    """Beat at `place` in the launcher's store, and listen to the next rank, while the block runs.

    An error that ends the block ends the other ranks too.
    """
    if dist.get_world_size() == 1:
        yield
        return
    pulse = _Pulse(dist.get_rank(), dist.get_world_size(), silent_seconds, place)
    pulse.start()
    try:
        yield
    except BaseException as error:
        before_teardown(pulse.leave_together)
        pulse.end()
        # Rank 0 tells what it has met itself, and may still be about it.
        if not isinstance(error, FailedOnMainRank):
            pulse.tell_failure(exit_code_of(error))
        raise
    pulse.end()
    pulse.leave()


class _Pulse(threading.Thread):
    def __init__(self, rank: int, world_size: int, silent_seconds: float, place: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        # A connection of its own, since one serves one thread at a time.
        store: Any = dist
        self._store = store.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(silent_seconds, 10.0)),
        )
        self._rank, self._next = rank, (rank + 1) % world_size
        self._own_key, self._next_key = f"{place}/beat/{rank}", f"{place}/beat/{self._next}"
        self._failed_key = f"{place}/failed"
        self._left_keys = [f"{place}/left/{r}" for r in range(world_size)]
        self._limit = silent_seconds
        self._pause = min(_MOST_SECONDS_BETWEEN_BEATS, silent_seconds / 5)
        self._process = asdict(Process.this())
        self._ended = threading.Event()

    def run(self) -> None:
        """Beat and listen until the end. Pauses are counted, not time, in which this process may have stood still."""
        last, silent = b"", 0.0
        for count in itertools.count():
            try:
                self._store.set(self._own_key, json.dumps([count, self._process]))
                seen, failed = self._found(self._next_key), self._found(self._failed_key)
            except RuntimeError:
                self._launcher_is_gone()
                return
            if failed:
                self._follow(*json.loads(failed))
                return
            silent = 0.0 if seen != last or seen in (b"", _LEFT) else silent + self._pause
            last = seen
            if silent >= self._limit:
                self._give_up(Process(**json.loads(seen)[1]))
            if self._ended.wait(self._pause):
                return

    def end(self) -> None:
        """Stop, so that nobody waits for the next beat."""
        self._ended.set()
        self.join()
        self._set(self._own_key, _LEFT)

    def tell_failure(self, exit_code: int) -> None:
        """Let the other ranks end with `exit_code`, unless one has failed before."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._failed_key, "", json.dumps([self._rank, exit_code]))

    def leave(self) -> None:
        """Tell those who wait for it that this rank is done."""
        self._set(self._left_keys[self._rank], "yes")

    def leave_together(self) -> None:
        """Leave, and wait for the other ranks to do so.

        A launcher stops all ranks once one is gone, whatever they were about to say, and where rank 0 holds the store
        nobody would hear of its failure.
        """
        self.leave()
        deadline = time.monotonic() + 2 * self._limit
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self._store.check(self._left_keys):
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _found(self, key: str) -> bytes:
        found: bytes = self._store.get(key) if self._store.check([key]) else b""
        return found

    def _set(self, key: str, value: str | bytes) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(key, value)

    def _follow(self, failed: int, exit_code: int) -> None:
        """End this process as rank `failed` does, for which it may wait, unless it leaves by itself in time.

        A rank that has saved and stops may have more to finish than one that fails.
        """
        stopped = exit_code == StoppedEarly.exit_code
        if self._ended.wait(self._limit if stopped else self._limit / 4):
            return
        logger.error("rank %d has ended with exit code %d, and this rank with it", failed, exit_code)
        self.leave()
        exit_now(exit_code)

    def _give_up(self, silent: Process) -> None:
        """End this process, and the silent one where it is of this machine: both wait for what will not come."""
        logger.error(
            "rank %d (%s) has shown no sign of life for %.0f s: all ranks end; run the same command again to continue",
            self._next,
            silent,
            self._limit,
        )
        if silent.is_here and not silent.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(silent.pid, signal.SIGKILL)
        os._exit(AlignError.exit_code)

    def _launcher_is_gone(self) -> None:
        """Stop as on any SIGTERM: nobody is left who would end this rank, and the run folder would stay held."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not self._ended.is_set():
            logger.error("the launcher of the ranks is gone: they save and end")
            os.kill(os.getpid(), signal.SIGTERM)
