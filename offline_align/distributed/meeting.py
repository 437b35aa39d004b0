"""Ranks agree on a place of their own in the store that they meet in.

Launchers keep their store over restarts, and a process may have several sessions: what an earlier one left there
(addresses, beats) would be taken for what belongs to this one. The number of the restart names no place, for every node
counts its own.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from offline_align.errors import AlignError

_LONGEST_PAUSE_SECONDS = 0.25


def fresh_place(store: Any, rank: int, world_size: int, limit_seconds: float) -> str:
    """Return a name that no earlier meeting in `store` had, the same on all ranks.

    Rank 0 chooses it. The others ask with a token that nobody else has and believe the answer to that token alone, so
    that nothing of a rank that is gone is taken for a question or an answer of now. Raises AlignError naming a rank
    that has not come within the limit.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f"asks/{rank}", token)
        for _ in _pauses(limit_seconds, 0):
            if store.check([f"answers/{token}"]):
                break
        place: str = store.get(f"answers/{token}").decode()
        store.set(f"{place}/came/{rank}", "yes")
        return place
    place = f"session_{store.add('sessions', 1)}"
    for other in range(1, world_size):
        answered = b""
        for _ in _pauses(limit_seconds, other):
            if store.check([f"{place}/came/{other}"]):
                break
            # The first token may be that of a rank that is gone; the living one's takes its place.
            if store.check([f"asks/{other}"]) and (asked := store.get(f"asks/{other}")) != answered:
                store.set(f"answers/{asked.decode()}", place)
                answered = asked
    return place


def _pauses(limit_seconds: float, awaited: int) -> Iterator[None]:
    """Yield after ever longer pauses; a wait inside of the store would hear no signal."""
    end, pause = time.monotonic() + limit_seconds, 0.002
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
    raise AlignError(f"rank {awaited} has not come within {limit_seconds:.0f} s: all ranks end")
