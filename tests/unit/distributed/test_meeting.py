"""Ranks find a place of their own in a store that is full of what is past."""

import threading
from typing import Any

import pytest
import torch.distributed as dist

from offline_align.distributed.meeting import fresh_place
from offline_align.errors import AlignError


@pytest.fixture
def store() -> Any:
    stores: Any = dist  # torch declares no types for them
    return stores.HashStore()


def meet(store: Any, world_size: int, late: float = 0.0) -> list[str]:
    """Return the place that each rank was told; the last rank comes `late`."""
    found = [""] * world_size

    def come(rank: int) -> None:
        found[rank] = fresh_place(store, rank, world_size, 20)

    timers = [threading.Timer(late if rank == world_size - 1 else 0.0, come, [rank]) for rank in range(world_size)]
    for timer in timers:
        timer.start()
    for timer in timers:
        timer.join()
    return found


def test_all_ranks_are_told_the_same_and_never_again(store: Any) -> None:
    places = [set(meet(store, 4, late)) for late in (0.0, 0.1, 0.0)]
    assert all(len(told) == 1 for told in places)
    assert len(set.union(*places)) == 3
    assert meet(store, 1) != meet(store, 1)


def test_what_was_asked_and_answered_before_is_nobodys(store: Any) -> None:
    # Rank 1 has asked, been answered and died; rank 2 has asked and died before rank 0 came.
    store.set("asks/1", "gone")
    store.set("answers/gone", "session_0")
    store.set("session_0/came/1", "yes")
    store.set("asks/2", "gone too")
    place, *others = meet(store, 3, late=0.3)
    assert place == "session_1"
    assert others == [place, place]


def test_a_rank_that_dies_after_its_answer_is_followed_by_another(store: Any) -> None:
    store.set("asks/1", "gone")
    found: list[str] = []
    host = threading.Thread(target=lambda: found.append(fresh_place(store, 0, 2, 20)))
    host.start()
    store.wait(["answers/gone"])
    assert host.is_alive()
    assert [fresh_place(store, 1, 2, 20)] == ["session_1"]
    host.join()
    assert found == ["session_1"]


@pytest.mark.parametrize(("rank", "missing"), [(0, 1), (1, 0)])
def test_a_rank_that_does_not_come_is_named(store: Any, rank: int, missing: int) -> None:
    with pytest.raises(AlignError, match=f"rank {missing} has not come within 0 s"):
        fresh_place(store, rank, 2, 0.2)
