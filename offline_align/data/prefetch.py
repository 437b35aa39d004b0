"""Work for the next steps, done by a thread while this step computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice


def prefetch[A, T](make: Callable[[A], T], items: Iterable[A], depth: int = 2) -> Generator[T]:
    """Yield `make(item)` for each of `items`, in order, with up to `depth` results waiting.

    An error of `make` is raised where its result would have come. One thread makes them all: numpy, torch and the
    tokenizers let go of the interpreter while they work, and the order stays that of `items`. Those are taken by the
    thread that asks for the results.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting: deque[Future[T]] = deque()
        upcoming = iter(items)
        try:
            while True:
                waiting += [pool.submit(make, item) for item in islice(upcoming, depth + 1 - len(waiting))]
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            # A stop in the middle must not wait for steps that nobody will take.
            pool.shutdown(wait=True, cancel_futures=True)
