"""Ranks that have died or stand still are noticed by the others, in whatever they wait, and named.

A rank that is killed breaks the connections of gloo, not those of NCCL, and a rank that stands still breaks none: the
others would wait for the half hour that a collective may take. So every rank beats from a thread of its own, by a
counter in the store that the ranks have met in, and listens to the rank after it. Work of any length is no silence.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from offline_align.distributed.process import Process
from offline_align.errors import AlignError

logger = logging.getLogger(__name__)
_MOST_SECONDS_BETWEEN_BEATS = 2.0
_LEFT = b"left"


@contextlib.contextmanager
def heartbeat(silent_seconds: float, place: str) -> Iterator[None]:
    """Beat at `place` in the launcher's store, and listen to the next rank, while the block runs."""
    if dist.get_world_size() == 1:
        yield
        return
    pulse = _Pulse(dist.get_rank(), dist.get_world_size(), silent_seconds, place)
    pulse.start()
    try:
        yield
    finally:
        pulse.end()


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
        self._next = (rank + 1) % world_size
        self._own_key, self._next_key = f"{place}/beat/{rank}", f"{place}/beat/{self._next}"
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
                seen = self._store.get(self._next_key) if self._store.check([self._next_key]) else b""
            except RuntimeError:
                self._launcher_is_gone()
                return
            silent = 0.0 if seen != last or seen in (b"", _LEFT) else silent + self._pause
            last = seen
            if silent >= self._limit:
                self._give_up(Process(**json.loads(seen)[1]))
            if self._ended.wait(self._pause):
                return

    def end(self) -> None:
        """Take leave, so that nobody waits for the next beat."""
        self._ended.set()
        self.join()
        with contextlib.suppress(RuntimeError):
            self._store.set(self._own_key, _LEFT)

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
