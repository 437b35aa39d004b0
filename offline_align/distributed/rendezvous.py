"""Rendezvous: connect all ranks to one store and agree on a key prefix for this session.

A launcher keeps its store across restarts, and one process may open several sessions. Without a
fresh prefix a rank would mistake keys of an earlier session (addresses, heartbeats) for current
ones. The restart count cannot serve as the prefix, because every node counts its own restarts.

A rank that waits logs for whom and at which address. It waits in Python, because signal handlers
do not run during torch's own waits.
"""

import datetime
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from offline_align.errors import AlignError

logger = logging.getLogger(__name__)
_LONGEST_PAUSE_SECONDS = 0.25
_FIRST_MESSAGE_SECONDS = 5.0
_LONGEST_SILENCE_SECONDS = 60.0
# Limit of one connection attempt by torch, during which no signal handler runs.
_CONNECT_SECONDS = 3.0


def rendezvous(rank: int, world_size: int, limit_seconds: float) -> tuple[Any, str]:
    """Wait for all ranks; return the store at MASTER_ADDR:MASTER_PORT and this session's key prefix.

    Raises AlignError if a rank does not arrive within `limit_seconds`, or if rank 0 cannot open the
    port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _store(address, port, rank, limit_seconds)
    return store, fresh_prefix(store, rank, world_size, limit_seconds, f" at {address}:{port}")


@cache
def _store(address: str, port: int, rank: int, limit_seconds: float) -> Any:
    """Return the store: rank 0 hosts it unless torchrun does, and the other ranks connect to it.

    All sessions of a process share one connection.
    """
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    why = ""

    def awaited() -> str:
        return f"rank 0 at {address}:{port} ({why})"

    for _ in _pauses(limit_seconds, rank, awaited):
        try:
            if not hosts:
                # Unlike torch's own connection attempt, this one can be interrupted by a signal.
                socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
            return _open(address, port, hosts, limit_seconds)
        except (OSError, RuntimeError) as error:  # the errors of torch's stores are RuntimeErrors
            why = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
            if hosts and "EADDRINUSE" in why:
                raise AlignError(f"MASTER_PORT={port}: another process has this port; choose a free one") from error
    raise AssertionError("unreachable")


def _open(address: str, port: int, hosts: bool, limit_seconds: float) -> Any:
    import torch.distributed as dist

    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=_CONNECT_SECONDS)
    store = tcp_store(address, port, None, hosts, timeout, wait_for_workers=False, multi_tenant=True)
    store.set_timeout(datetime.timedelta(seconds=limit_seconds))
    return store


def fresh_prefix(store: Any, rank: int, world_size: int, limit_seconds: float, where: str = "") -> str:
    """Return a key prefix that no earlier session in `store` used; it is the same on all ranks.

    Rank 0 chooses the prefix. Every other rank asks with a unique token and accepts only the answer
    to that token, so keys that a dead rank has left behind are ignored. `where` follows the names
    of missing ranks in messages. Raises AlignError naming the ranks that do not arrive within
    `limit_seconds`.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f"asks/{rank}", token)
        for _ in _pauses(limit_seconds, rank, lambda: f"rank 0{where}"):
            if store.check([f"answers/{token}"]):
                break
        prefix: str = store.get(f"answers/{token}").decode()
        store.set(f"{prefix}/came/{rank}", "yes")
        return prefix
    prefix = f"session_{store.add('sessions', 1)}"
    awaited = 1

    def missing() -> str:
        late = [r for r in range(awaited, world_size) if r == awaited or not store.check([f"asks/{r}"])]
        return f"{_ranks(late)}{where}"

    for awaited in range(1, world_size):
        answered = b""
        for _ in _pauses(limit_seconds, rank, missing):
            # Read the token before looking for the arrival: a rank that has arrived may ask for its
            # next session.
            asked = store.get(f"asks/{awaited}") if store.check([f"asks/{awaited}"]) else answered
            if store.check([f"{prefix}/came/{awaited}"]):
                break
            # The first token may be left from a dead rank; the token of the living rank replaces
            # it.
            if asked != answered:
                store.set(f"answers/{asked.decode()}", prefix)
                answered = asked
    return prefix


def _ranks(numbers: list[int]) -> str:
    """Return the ranks as text, shortened to `ranks 1, 2 and 61 more` if there are many."""
    shown, more = numbers[:8], len(numbers) - 8
    names = ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {names}"


def _pauses(limit_seconds: float, rank: int, awaited: Callable[[], str]) -> Iterator[None]:
    """Yield after increasing pauses, and log from time to time who is `awaited`.

    Raises AlignError after `limit_seconds`.
    """
    start, pause, due = time.monotonic(), 0.002, _FIRST_MESSAGE_SECONDS
    # Ranks other than 0 show errors only, and rank 0 cannot report a rank that does not reach it.
    level = logging.ERROR if rank else logging.WARNING
    while (waited := time.monotonic() - start) < limit_seconds:
        yield
        if waited >= due:
            logger.log(level, "rank %d waits for %s, for %.0f s so far", rank, awaited(), waited)
            due += min(due, _LONGEST_SILENCE_SECONDS)
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
    late = awaited()
    has = "have" if late.startswith("ranks") else "has"
    raise AlignError(f"{late} {has} not come within {limit_seconds:.0f} s: all ranks end")
