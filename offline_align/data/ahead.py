"""Work for the next steps, done by a thread while this step computes."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor


def prepared_ahead[T](make: Callable[[int], T], numbers: range, depth: int = 2) -> Generator[T]:
    """Yield `make(n)` for each of `numbers`, in order, with up to `depth` results waiting.

    An error of `make` is raised where its result would have come. One thread makes them all: numpy and torch let go
    of the interpreter while they copy, and their order stays that of `numbers`.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting: deque[Future[T]] = deque()
        upcoming = iter(numbers)
        try:
            for _ in range(len(numbers)):
                while len(waiting) <= depth and (number := next(upcoming, None)) is not None:
                    waiting.append(pool.submit(make, number))
                yield waiting.popleft().result()
        finally:
            # A stop in the middle must not wait for steps that nobody will take.
            pool.shutdown(wait=True, cancel_futures=True)
