"""Exit of a rank that has failed: immediate, but only after all ranks have reported their errors.

A normal exit of Python runs the destructors of torch and NCCL. They may wait for ranks that never
answer, and the launcher would wait with them.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_callbacks: list[Callable[[], None]] = []


def before_teardown(callback: Callable[[], None]) -> None:
    """Make `exit_process` call `callback` and then end this process without running destructors."""
    _callbacks.append(callback)


def exit_process(exit_code: int) -> NoReturn:
    """Exit with `exit_code`: normally, or at once if `before_teardown` has a callback."""
    # When the first rank ends, the launcher sends a signal to the others. Neither that nor a user who
    # asks twice may change the exit code, or get a traceback.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: exit_now(exit_code))
    if not _callbacks:
        sys.exit(exit_code)
    for callback in _callbacks:
        callback()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    exit_now(exit_code)


def exit_now(exit_code: int) -> NoReturn:
    """End this process and its child processes at once, whatever its threads are doing.

    A generation engine may have started child processes.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(exit_code)
