from collections.abc import Sequence
from pathlib import Path

from offline_align.distributed.stopping import StopRequest
from offline_align.generate.journal import Journal
from offline_align.generate.requests import Completion, Request
from offline_align.generate.runner import answer_all, batches, share

REQUESTS = [Request(row, 0, [1] * (1 + row * 7 % 11), 5) for row in range(100)]


class Echo:
    """Answers with the row, and remembers its batches."""

    batch_size = 3

    def __init__(self, stop: StopRequest | None = None) -> None:
        self.calls: list[list[int]] = []
        self.stop = stop

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls.append([request.row for request in requests])
        if self.stop and len(self.calls) == 2:
            self.stop.expect(1e9)
        return [Completion(r.row, r.sample_index, str(r.row), "stop", 2) for r in requests]


def test_shares_divide_the_requests() -> None:
    parts = [share(REQUESTS, rank, 3) for rank in range(3)]
    assert sorted(request.row for part in parts for request in part) == list(range(100))
    assert max(map(len, parts)) - min(map(len, parts)) == 1


def test_batches_hold_every_request_once_sorted_by_length() -> None:
    found = list(batches(REQUESTS, 3))
    assert sorted(request.row for batch in found for request in batch) == list(range(100))
    lengths = [len(request.context) for batch in found[:32] for request in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_all_answers_reach_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "k" * 16, 0)
    journal.start()
    assert answer_all(Echo(), REQUESTS, journal, StopRequest(), show_progress=False)
    assert {place: done.response for place, done in journal.read().items()} == {
        (row, 0, 0): str(row) for row in range(100)
    }


def test_a_stop_request_leaves_finished_batches_in_the_journal(tmp_path: Path) -> None:
    stop = StopRequest(max_seconds=3600)
    engine = Echo(stop)
    journal = Journal(tmp_path, "k" * 16, 0)
    journal.start()
    assert not answer_all(engine, REQUESTS, journal, stop, show_progress=False)
    assert len(engine.calls) == 2
    assert len(journal.read()) == 6
