"""Exit after an error among several ranks: at once, with the right code, after the callback."""

import signal
import subprocess
import sys

import pytest

from offline_align.distributed.teardown import exit_process
from offline_align.errors import (
    AlignError,
    ConfigError,
    DataError,
    FailedOnMainRank,
    StoppedEarly,
    StorageError,
    exit_code_of,
)

PROGRAM = """
import atexit, multiprocessing, os, signal, sys, threading, time
from offline_align.distributed import teardown

def callback():
    if "signal" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    print("callback")

atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print("an error", file=sys.stderr, end=" ")
teardown.before_teardown(callback)
teardown.exit_process(74)
"""


@pytest.mark.parametrize(("word", "said"), [("none", "callback\n"), ("signal", "")])
def test_nothing_delays_the_exit_of_a_failed_rank(word: str, said: str) -> None:
    # The child process inherits the pipes, so `run` returns only after the child has ended as well.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (74, said, "an error ")


def test_any_other_process_exits_normally() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as ended:
            exit_process(78)
        assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT], "a signal cannot change the exit code"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 78


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError(), 65),
        (AlignError(), 70),
        (RuntimeError(), 70),
        (KeyboardInterrupt(), 70),
        (StorageError(), 74),
        (OSError(), 74),
        (StoppedEarly(), 75),
        (ConfigError("x"), 78),
        (FailedOnMainRank(65), 65),
    ],
)
def test_the_exit_code_of_an_error(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code
