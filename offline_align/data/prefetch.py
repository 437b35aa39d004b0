"""Prefetch: a thread prepares the data of the next steps while the current step computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice


def prefetch[A, T](make: Callable[[A], T], items: Iterable[A], depth: int = 2) -> Generator[T]:
    """Yield `make(item)` for each of `items`, in order, computing up to `depth` results in advance.

    An error in `make` is raised in place of its result. A single thread calls `make`, so the order
    is that of `items`; numpy, torch and the tokenizers release the GIL while they work. `items` is
    iterated in the consumer's thread.
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
            # If the consumer stops early, pending items are not computed.
            pool.shutdown(wait=True, cancel_futures=True)
