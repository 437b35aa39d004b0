"""Stop requests by signals and limits and votes of all ranks."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from offline_align.distributed.stopping import StopVote, interruptible, signals_heard, stop_requests
from offline_align.errors import StoppedEarly

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_the_reason_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        reason: str | None = stop.reason
        assert reason == number.name
    assert signal.getsignal(number) is before


def test_a_limit_keeps_time_for_the_next_step() -> None:
    with stop_requests("100") as stop:
        stop.expect(50)
        assert stop.reason is None
        stop.expect(200)
        assert stop.reason == "trainer.max_time"


def test_a_vote_is_read_one_round_later_and_at_the_end() -> None:
    heard: list[int] = []

    class Ranks:
        asked = 0

        def any_rank(self, flag: bool) -> Callable[[], bool]:
            number, self.asked = self.asked, self.asked + 1

            def answer() -> bool:
                heard.append(number)
                return flag

            return answer

    ranks: Any = Ranks()
    with stop_requests("100") as stop:
        vote = StopVote(stop, ranks)
        assert not vote.newest(), "nobody has voted"
        assert [vote(), vote()] == [False, False]
        stop.expect(200)
        assert [vote(), vote()] == [False, True]
        assert vote.newest()
    assert heard == [0, 1, 2, 3], "each answer once, in order"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_at_once_unless_a_loop_handles_it(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedEarly, match=number.name), interruptible():
        with stop_requests() as stop:
            os.kill(os.getpid(), number)
            assert stop.reason == number.name
        os.kill(os.getpid(), number)
        raise AssertionError("went on")
    assert signal.getsignal(number) is before


def test_a_request_is_acknowledged_while_the_main_thread_is_in_a_library(capfd: pytest.CaptureFixture[str]) -> None:
    """The handler of Python has no turn as long as one operation lasts."""
    with interruptible(), stop_requests(doing="step 12") as stop:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        waited, said = time.monotonic(), ""
        while not said and time.monotonic() - waited < 5:
            said = capfd.readouterr().err
        assert said == "offline-align: SIGINT: finishing step 12; again to stop at once\n"
        assert stop.reason == "SIGINT"


def test_other_ranks_do_not_repeat_the_acknowledgement(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with interruptible(), stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        while signals_heard() < 1:
            time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_a_process_that_is_inside_a_library() -> None:
    """Python's handler has no turn in this one operation, which lasts for minutes."""
    child = os.fork()
    if child == 0:
        with interruptible(), stop_requests():
            for delay in (0.3, 0.6):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        os._exit(0)
    started = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 60


def test_a_stop_that_a_library_turns_into_its_own_error_is_recognised() -> None:
    def draw() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StoppedEarly:
            raise ValueError("Invalid bounding box") from None

    with pytest.raises(StoppedEarly, match="SIGTERM"), interruptible():
        draw()


def test_a_limit_ends_a_command_anywhere() -> None:
    with pytest.raises(StoppedEarly, match=r"trainer\.max_time"), interruptible() as limit:
        limit("0.05")
        time.sleep(5)
        raise AssertionError("went on")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_counts_from_the_start_of_the_command() -> None:
    with interruptible() as limit:
        limit("0.2")
        time.sleep(0.1)
        with stop_requests("0.2") as stop:
            assert stop.reason is None
            time.sleep(0.15)
            assert stop.reason == "trainer.max_time"


def test_the_second_signal_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        with interruptible(), stop_requests():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("listening", [False, True])
def test_a_worker_forked_from_a_command_dies_of_the_signal(listening: bool) -> None:
    """It has nothing to save, and its parent would wait for it forever."""
    ready, tell = os.pipe()
    with interruptible(), stop_requests() if listening else interruptible():
        child = os.fork()
        if child == 0:
            os.write(tell, b"!")
            time.sleep(20)
            os._exit(0)
        # Python drops signals that arrive before it has finished its own work after a fork.
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
