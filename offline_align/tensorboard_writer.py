"""TensorBoard's files: where they lie, and what a disk that fails under them says."""

import contextlib
import threading
from collections.abc import Iterator

FOLDER = "tensorboard"


@contextlib.contextmanager
def silent_writer_thread() -> Iterator[None]:
    """Leave errors of the operating system in TensorBoard's thread unsaid: the next call of its writer raises them."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
