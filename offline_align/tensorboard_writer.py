"""The folder of TensorBoard's files, and the handling of write errors in its thread."""

import contextlib
import threading
from collections.abc import Iterator

FOLDER = "tensorboard"


@contextlib.contextmanager
def silent_writer_thread() -> Iterator[None]:
    """Suppress the traceback of an OSError in TensorBoard's thread; the next call of its writer raises it."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
