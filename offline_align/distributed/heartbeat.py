"""Heartbeats: detect ranks that have died, hang or fail, name them, and end the other ranks.

A killed rank closes its gloo connections but not its NCCL ones, and a rank that hangs closes none.
The others would wait in a collective until its timeout of half an hour. So a thread of every rank
increments a counter in the rendezvous store and watches the counter of the next rank. The thread
keeps running during long work, so only a dead or stopped process goes silent.

A rank that fails writes its exit code into the store. The other ranks exit with the same code,
unless they exit by themselves first, for example because all ranks have raised the same error.
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
_LONGEST_BEAT_SECONDS = 2.0
_POLL_SECONDS = 0.05
_LEFT = b"left"


@contextlib.contextmanager
def heartbeat(silent_seconds: float, prefix: str) -> Iterator[None]:
    """Send heartbeats and watch the next rank while the block runs.

    All keys in the launcher's store start with `prefix`. A rank without a heartbeat for
    `silent_seconds` counts as lost. An error that ends the block ends the other ranks too.
    """
    if dist.get_world_size() == 1:
        yield
        return
    thread = _Heartbeat(dist.get_rank(), dist.get_world_size(), silent_seconds, prefix)
    thread.start()
    try:
        yield
    except BaseException as error:
        before_teardown(thread.leave_together)
        thread.end()
        # FailedOnMainRank repeats an error of rank 0, which reports it itself.
        if not isinstance(error, FailedOnMainRank):
            thread.report_failure(exit_code_of(error))
        raise
    thread.end()
    thread.leave()


class _Heartbeat(threading.Thread):
    def __init__(self, rank: int, world_size: int, silent_seconds: float, prefix: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        # This thread opens its own connection, because a connection serves one thread at a time.
        store: Any = dist
        self._store = store.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(silent_seconds, 10.0)),
        )
        self._rank, self._next = rank, (rank + 1) % world_size
        self._own_key, self._next_key = f"{prefix}/beat/{rank}", f"{prefix}/beat/{self._next}"
        self._failed_key = f"{prefix}/failed"
        self._left_keys = [f"{prefix}/left/{r}" for r in range(world_size)]
        self._limit = silent_seconds
        self._pause = min(_LONGEST_BEAT_SECONDS, silent_seconds / 5)
        self._process = asdict(Process.this())
        self._ended = threading.Event()

    def run(self) -> None:
        """Send heartbeats and watch the next rank until `end` is called.

        Silence is the sum of this thread's pauses, not elapsed time: this process may itself have
        been stopped in between.
        """
        last, silent = b"", 0.0
        for count in itertools.count():
            try:
                self._store.set(self._own_key, json.dumps([count, self._process]))
                seen, failed = self._get(self._next_key), self._get(self._failed_key)
            except RuntimeError:
                self._stop_without_launcher()
                return
            if failed:
                self._exit_like(*json.loads(failed))
                return
            silent = 0.0 if seen != last or seen in (b"", _LEFT) else silent + self._pause
            last = seen
            if silent >= self._limit:
                self._end_all(Process(**json.loads(seen)[1]))
            if self._ended.wait(self._pause):
                return

    def end(self) -> None:
        """Stop the thread, and mark this rank as left so that no other rank counts it as silent."""
        self._ended.set()
        self.join()
        self._set(self._own_key, _LEFT)

    def report_failure(self, exit_code: int) -> None:
        """Make the other ranks exit with `exit_code`, unless another rank has failed before."""
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(self._failed_key, "", json.dumps([self._rank, exit_code]))

    def leave(self) -> None:
        """Tell the ranks in `leave_together` that this rank is done."""
        self._set(self._left_keys[self._rank], "yes")

    def leave_together(self) -> None:
        """Mark this rank as done, and wait until the other ranks are done as well.

        A launcher stops all ranks as soon as one exits, even before they have reported their
        errors. And if rank 0 hosts the store, its exit would hide the recorded failure from the
        others.
        """
        self.leave()
        deadline = time.monotonic() + 2 * self._limit
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and not self._store.check(self._left_keys):
                time.sleep(_POLL_SECONDS)

    def _get(self, key: str) -> bytes:
        value: bytes = self._store.get(key) if self._store.check([key]) else b""
        return value

    def _set(self, key: str, value: str | bytes) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(key, value)

    def _exit_like(self, failed: int, exit_code: int) -> None:
        """Exit with the code of rank `failed`, unless this rank exits by itself in time.

        The main thread may be waiting for the failed rank in a collective. After an early stop this
        rank gets more time, because it may still be saving.
        """
        stopped = exit_code == StoppedEarly.exit_code
        if self._ended.wait(self._limit if stopped else self._limit / 4):
            return
        logger.error("rank %d has ended with exit code %d; this rank exits with the same code", failed, exit_code)
        self.leave()
        exit_now(exit_code)

    def _end_all(self, silent: Process) -> None:
        """End this process, and the silent one if it runs here: neither can continue."""
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

    def _stop_without_launcher(self) -> None:
        """Stop as on SIGTERM if the store of the launcher is gone.

        Without its launcher nothing would end this rank, and it would keep the run folder locked.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not self._ended.is_set():
            logger.error("the launcher of the ranks is gone: all ranks save and exit")
            os.kill(os.getpid(), signal.SIGTERM)
