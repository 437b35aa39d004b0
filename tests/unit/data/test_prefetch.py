"""Prefetch: order, errors and early stops."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from offline_align.data.prefetch import prefetch


def test_results_come_in_order_and_once() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number * number

    assert list(prefetch(make, range(3, 20))) == [n * n for n in range(3, 20)]
    assert made == list(range(3, 20))


def test_prefetching_is_bounded() -> None:
    reached = threading.Event()
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 2:
            reached.set()
        return number

    upcoming = prefetch(make, range(100), depth=2)
    assert next(upcoming) == 0
    assert reached.wait(5)
    assert made == [0, 1, 2]
    upcoming.close()


def test_items_are_taken_in_the_thread_of_the_consumer_as_needed() -> None:
    takers, makers = [], []

    def items() -> Iterator[int]:
        for number in range(10):
            takers.append(threading.current_thread())
            yield number

    def make(number: int) -> int:
        makers.append(threading.current_thread())
        return number

    with closing(prefetch(make, items(), depth=2)) as upcoming:
        assert next(upcoming) == 0
        assert takers == [threading.current_thread()] * 3
        assert list(upcoming) == list(range(1, 10))
    assert len(takers) == len(makers) == 10
    assert threading.current_thread() not in makers


def test_an_error_is_raised_in_its_place() -> None:
    upcoming = prefetch(lambda n: 1 // (2 - n), range(5))
    assert list(itertools.islice(upcoming, 2)) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(upcoming)


def test_stopping_early_makes_no_more() -> None:
    made: list[int] = []
    upcoming = prefetch(lambda n: made.append(n), range(1000))
    next(upcoming)
    upcoming.close()
    assert len(made) <= 3
