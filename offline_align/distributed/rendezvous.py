"""Ranks meet in a store, and agree on a place of their own in it.

Launchers keep their store over restarts, and a process may have several sessions: what an earlier one left there
(addresses, beats) would be taken for what belongs to this one. The number of the restart names no place, for every node
counts its own.

Who waits says for whom and at which address. All waiting is done in Python, since torch's own waits hear no signal.
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
_FIRST_WORD_SECONDS = 5.0
_MOST_SECONDS_BETWEEN_WORDS = 60.0
# Torch tries a connection for so long without hearing a signal.
_DEAF_SECONDS = 3.0


def meet(rank: int, world_size: int, limit_seconds: float) -> tuple[Any, str]:
    """Return the store at MASTER_ADDR and MASTER_PORT that all ranks have come to, and this session's place in it.

    Raises AlignError if a rank has not come within the limit, or if rank 0 cannot open the port.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = _store(address, port, rank, limit_seconds)
    return store, fresh_prefix(store, rank, world_size, limit_seconds, f" at {address}:{port}")


@cache
def _store(address: str, port: int, rank: int, limit_seconds: float) -> Any:
    """Open the store, or connect to it: rank 0 holds it unless torchrun does. All sessions of a process share it."""
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    why = ""

    def awaited() -> str:
        return f"rank 0 at {address}:{port} ({why})"

    for _ in _pauses(limit_seconds, rank, awaited):
        try:
            if not holds:
                # Unlike torch, this hears signals while it waits.
                socket.create_connection((address, port), timeout=_DEAF_SECONDS).close()
            return _open(address, port, holds, limit_seconds)
        except (OSError, RuntimeError) as error:  # the errors of torch's stores are RuntimeErrors
            why = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
            if holds and "EADDRINUSE" in why:
                raise AlignError(f"MASTER_PORT={port}: another process has this port; choose a free one") from error
    raise AssertionError("unreachable")


def _open(address: str, port: int, holds: bool, limit_seconds: float) -> Any:
    import torch.distributed as dist

    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=_DEAF_SECONDS)
    store = tcp_store(address, port, None, holds, timeout, wait_for_workers=False, multi_tenant=True)
    store.set_timeout(datetime.timedelta(seconds=limit_seconds))
    return store


def fresh_prefix(store: Any, rank: int, world_size: int, limit_seconds: float, where: str = "") -> str:
    """Return a name that no earlier meeting in `store` had, the same on all ranks.

    Rank 0 chooses it. The others ask with a token that nobody else has and believe the answer to that token alone, so
    that nothing of a rank that is gone is taken for a question or an answer of now. Raises AlignError naming a rank
    that has not come within the limit. `where` is said with the names of the ranks that are missing.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f"asks/{rank}", token)
        for _ in _pauses(limit_seconds, rank, lambda: f"rank 0{where}"):
            if store.check([f"answers/{token}"]):
                break
        place: str = store.get(f"answers/{token}").decode()
        store.set(f"{place}/came/{rank}", "yes")
        return place
    place = f"session_{store.add('sessions', 1)}"
    awaited = 1

    def missing() -> str:
        late = [r for r in range(awaited, world_size) if r == awaited or not store.check([f"asks/{r}"])]
        return f"{_ranks(late)}{where}"

    for awaited in range(1, world_size):
        answered = b""
        for _ in _pauses(limit_seconds, rank, missing):
            if store.check([f"{place}/came/{awaited}"]):
                break
            # The first token may be that of a rank that is gone; the living one's takes its place.
            if store.check([f"asks/{awaited}"]) and (asked := store.get(f"asks/{awaited}")) != answered:
                store.set(f"answers/{asked.decode()}", place)
                answered = asked
    return place


def _ranks(numbers: list[int]) -> str:
    """Return ranks in words, `ranks 1, 2 and 61 more` if there are many."""
    shown, more = numbers[:8], len(numbers) - 8
    names = ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {names}"


def _pauses(limit_seconds: float, rank: int, awaited: Callable[[], str]) -> Iterator[None]:
    """Yield after ever longer pauses, and say now and then who is `awaited`; raises AlignError at the limit."""
    start, pause, due = time.monotonic(), 0.002, _FIRST_WORD_SECONDS
    # Ranks other than 0 show errors only, and one that does not reach rank 0 is not heard through it.
    level = logging.ERROR if rank else logging.WARNING
    while (waited := time.monotonic() - start) < limit_seconds:
        yield
        if waited >= due:
            logger.log(level, "rank %d waits for %s, since %.0f s", rank, awaited(), waited)
            due += min(due, _MOST_SECONDS_BETWEEN_WORDS)
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
    late = awaited()
    has = "have" if late.startswith("ranks") else "has"
    raise AlignError(f"{late} {has} not come within {limit_seconds:.0f} s: all ranks end")
