"""How a process ends that is one of several ranks and has failed: at once, but not before all ranks have said why.

Python's own way out would run what torch and NCCL do at the end of a process, and that may wait for ranks which never
come: the launcher would see no end.
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
    """Let `exit_process` end this process at once, after `callback`."""
    _callbacks.append(callback)


def exit_process(exit_code: int) -> NoReturn:
    """End this process: as any other does, or at once where a session of several ranks has ended with an error."""
    if not _callbacks:
        sys.exit(exit_code)
    # The launcher stops the ranks that are left when the first one ends. What has happened keeps its code.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: exit_now(exit_code))
    for callback in _callbacks:
        callback()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    exit_now(exit_code)


def exit_now(exit_code: int) -> NoReturn:
    """End this process whatever its threads do, and those that it has started, as an engine may have."""
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(exit_code)
