"""Words about long work: rates with units, what is left, and what takes long before it ends."""

import logging
import time
from collections.abc import Iterator

import pytest

from offline_align import progress
from offline_align.progress import Meter, announced
from offline_align.train.first_step import FirstStep
from offline_align.wording import counted, duration, pace, size


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Clock]:
    caplog.set_level(logging.INFO, "offline_align")
    found = Clock()
    with monkeypatch.context() as patch:
        patch.setattr("offline_align.progress.time.monotonic", lambda: found.now)
        yield found


def test_the_first_of_many_slow_steps_gets_a_line_at_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Meter("training", 10, "steps") as meter:
        clock.now += 3.2
        meter.advance(note="410 tokens/s")
        clock.now += 3.2
        meter.advance()
    assert caplog.messages[0] == "training: 1 of 10 steps, 3.2 s a step, 410 tokens/s, about 29 s left"
    assert len(caplog.messages) == 2, "the second step is due only after 15 s; then there is the end"


def test_quick_work_gets_one_line_with_its_rate(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Meter("labelling", 40, "rows") as meter:
        for _ in range(4):
            clock.now += 0.5
            meter.advance(10)
    assert caplog.messages == ["labelling: all 40 rows, in 2.0 s, 20 rows/s"]


def test_the_time_of_a_save_is_not_that_of_a_step(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Meter("training", 2, "steps") as meter:
        for _ in range(2):
            clock.now += 3.0
            meter.advance()
            with meter.paused():
                clock.now += 20
    assert caplog.messages[-1] == "training: all 2 steps, in 46 s, 3.0 s a step"


def test_a_rate_below_one_has_an_article() -> None:
    assert (pace(0.5, "answers"), pace(0.5, "rows")) == ("2.0 s an answer", "2.0 s a row")


def test_a_continued_run_counts_only_its_own_steps(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with Meter("training", 12, "steps", done=10) as meter:
        clock.now += 20
        meter.advance()
        clock.now += 20
        meter.advance()
    assert caplog.messages[0] == "training: 11 of 12 steps, 20 s a step, about 20 s left"


def test_large_files_are_announced_and_timed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with announced("hashing base", 2_500_000_000):
        clock.now += 14
    assert caplog.messages == ["hashing base, 2.5 GB ...", "hashing base: took 14 s"]


def test_small_and_quick_work_is_not_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offline_align")
    with announced("hashing rows", 10):
        pass
    assert caplog.messages == []


def test_work_that_turns_out_slow_is_announced_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.02)
    caplog.set_level(logging.INFO, "offline_align")
    with announced("loading"):
        for _ in range(200):
            time.sleep(0.01)
            if caplog.messages:
                break
        assert caplog.messages == ["loading ..."]
    assert caplog.messages[1].startswith("loading: took ")


def test_a_failed_block_has_only_its_error(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError), announced("saving", 2_000_000_000):
        raise ValueError
    assert caplog.messages == ["saving, 2.0 GB ..."]


def test_the_first_step_is_expected_from_its_first_bin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "offline_align")
    clock = Clock()
    monkeypatch.setattr("offline_align.train.first_step.time.monotonic", lambda: clock.now)
    first = FirstStep(1, 35, 128, [400, 400, 200], asynchronous=False)
    first(0)
    clock.now += 8.0
    first(1)
    first(2)
    assert caplog.messages == [
        "training: step 1 of 35 begins: 128 rows in 3 bins of 1,000 tokens on this rank",
        "training: this step will take about 20 s",
    ]


def test_numbers_have_units_and_plurals() -> None:
    assert [counted(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
    assert counted(1, "bad row is", "bad rows are") == "1 bad row is"
    assert counted(12_000, "entry", "entries") == "12,000 entries"
    seconds = (0.04, 9.94, 9.96, 59.6, 125, 3600, 12_000, 187_200)
    said = ["0.04 s", "9.9 s", "10 s", "1 min", "2 min 5 s", "1 h", "3 h 20 min", "2 d 4 h"]
    assert [duration(value) for value in seconds] == said
    assert [size(n) for n in (0, 999, 4_100, 999_600, 1_240_000_000)] == ["0 B", "999 B", "4.1 kB", "1.0 MB", "1.2 GB"]
    assert [pace(r, "steps") for r in (41.4, 2.5, 0.3125, 0.002)] == [
        "41 steps/s",
        "2.5 steps/s",
        "3.2 s a step",
        "8 min 20 s a step",
    ]
