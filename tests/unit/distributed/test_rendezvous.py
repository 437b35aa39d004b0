"""Rendezvous: a fresh prefix in a store with keys of earlier sessions, and waiting for missing ranks."""

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from offline_align.distributed import rendezvous
from offline_align.distributed.rendezvous import fresh_prefix
from offline_align.distributed.stopping import interruptible
from offline_align.errors import AlignError, StoppedEarly
from tests.support import free_ports


@pytest.fixture
def store() -> Any:
    stores: Any = dist  # torch declares no types for them
    return stores.HashStore()


def prefixes(store: Any, world_size: int, late: float = 0.0) -> list[str]:
    """Return the prefix that each rank gets; the last rank arrives `late` seconds after the others."""
    found = [""] * world_size

    def join(rank: int) -> None:
        found[rank] = fresh_prefix(store, rank, world_size, 20)

    timers = [threading.Timer(late if rank == world_size - 1 else 0.0, join, [rank]) for rank in range(world_size)]
    for timer in timers:
        timer.start()
    for timer in timers:
        timer.join()
    return found


def test_all_ranks_get_the_same_prefix_and_no_prefix_twice(store: Any) -> None:
    sessions = [set(prefixes(store, 4, late)) for late in (0.0, 0.1, 0.0)]
    assert all(len(found) == 1 for found in sessions)
    assert len(set.union(*sessions)) == 3
    assert prefixes(store, 1) != prefixes(store, 1)


def test_keys_of_dead_ranks_are_ignored(store: Any) -> None:
    # Rank 1 has asked, been answered and died; rank 2 has asked and died before rank 0 arrived.
    store.set("asks/1", "gone")
    store.set("answers/gone", "session_0")
    store.set("session_0/came/1", "yes")
    store.set("asks/2", "gone too")
    first, *others = prefixes(store, 3, late=0.3)
    assert first == "session_1"
    assert others == [first, first]


def test_a_rank_that_dies_after_its_answer_can_be_replaced(store: Any) -> None:
    store.set("asks/1", "gone")
    found: list[str] = []
    host = threading.Thread(target=lambda: found.append(fresh_prefix(store, 0, 2, 20)))
    host.start()
    store.wait(["answers/gone"])
    assert host.is_alive()
    assert [fresh_prefix(store, 1, 2, 20)] == ["session_1"]
    host.join()
    assert found == ["session_1"]


def test_a_question_for_the_next_session_is_not_answered_with_this_one(store: Any) -> None:
    class Racing:
        """Lets rank 1 arrive, and ask for its next session, right after rank 0 has looked for its arrival."""

        def check(self, keys: list[str]) -> bool:
            found: bool = store.check(keys)
            if keys == ["session_1/came/1"] and not found:
                store.set("session_1/came/1", "yes")
                store.set("asks/1", "next")
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    store.set("asks/1", "first")
    assert fresh_prefix(Racing(), 0, 2, 20) == "session_1"
    assert not store.check(["answers/next"])


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_missing_rank_is_named(store: Any, rank: int, missing: int) -> None:
    with pytest.raises(AlignError, match=f"rank {missing} has not come within 0 s"):
        fresh_prefix(store, rank, 2, 0.2)


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an address at which no other rank will arrive."""
    (port,) = free_ports(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(rendezvous, "_FIRST_MESSAGE_SECONDS", 0.05)
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("rank", "awaited"), [(0, "ranks 1, 2"), (2, "rank 0")])
def test_a_waiting_rank_names_the_missing_ones_and_can_be_stopped(
    nobody_there: str, rank: int, awaited: str, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    timer = threading.Timer(0.7, os.kill, [os.getpid(), number])
    with pytest.raises(StoppedEarly), interruptible():
        timer.start()
        began = time.monotonic()
        rendezvous.rendezvous(rank, 3, 60)
    assert time.monotonic() - began < 4
    said = [record.getMessage() for record in caplog.records]
    assert f"rank {rank} waits for {awaited} at {nobody_there}" in said[0]
    # The message is repeated at increasing intervals.
    assert 2 <= len(said) <= 5


@pytest.mark.parametrize(("rank", "awaited"), [(0, "rank 1 at"), (1, "rank 0 at")])
def test_waiting_ends_at_the_limit(nobody_there: str, rank: int, awaited: str) -> None:
    with pytest.raises(AlignError, match=f"{awaited} {nobody_there}.* has not come within 0 s"):
        rendezvous.rendezvous(rank, 2, 0.3)


def test_a_port_that_is_taken_is_named(nobody_there: str) -> None:
    port = int(nobody_there.partition(":")[2])
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(AlignError, match=f"MASTER_PORT={port}: another process has this port"):
            rendezvous.rendezvous(0, 2, 5)


def test_two_sessions_of_the_same_process(nobody_there: str) -> None:
    found: list[list[str]] = [[], []]

    def join(rank: int) -> None:
        for _ in range(2):
            found[rank].append(rendezvous.rendezvous(rank, 2, 20)[1])

    ranks = [threading.Thread(target=join, args=[rank]) for rank in (1, 0)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert found == [["session_1", "session_2"]] * 2


def test_a_long_list_of_ranks_is_shortened() -> None:
    assert rendezvous._ranks([3]) == "rank 3"
    assert rendezvous._ranks(list(range(1, 12))) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"
