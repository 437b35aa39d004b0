"""How a process ends after an error among several ranks: at once, with its code, after its callback."""

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

FAREWELL = """
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
def test_nothing_holds_up_a_rank_that_has_failed(word: str, said: str) -> None:
    # The child has our pipes: they are at their end once it has ended too.
    done = subprocess.run(
        [sys.executable, "-c", FAREWELL, word], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (74, said, "an error ")


def test_any_other_process_ends_as_python_does() -> None:
    with pytest.raises(SystemExit) as ended:
        exit_process(78)
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
def test_the_other_ranks_are_told_the_code_of_an_error(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code
