from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from offline_align.data.journal import Journal
from offline_align.distributed.stopping import StopRequest
from offline_align.generate.answer_journal import read_answers
from offline_align.generate.requests import Completion, Request
from offline_align.generate.runner import answer_all, batches, share

REQUESTS = [Request(row, 0, [1] * (1 + row * 7 % 11), 5) for row in range(100)]


class Echo:
    """Answers with the row number, and records its batches."""

    batch_size = 3

    def __init__(self, stop: StopRequest | None = None) -> None:
        self.calls: list[list[int]] = []
        self.stop = stop

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        self.calls.append([request.row for request in requests])
        if self.stop and len(self.calls) == 2:
            self.stop.expect(1e9)
        yield [Completion(r.row, r.sample_index, str(r.row), "stop", 2) for r in requests]


def rows(parts: list[list[Request]]) -> list[list[int]]:
    return [[request.row for request in batch] for batch in parts]


def test_shares_divide_the_batches() -> None:
    parts = [share(REQUESTS, 3, {}, rank, 3) for rank in range(3)]
    assert sorted(row for part in parts for batch in rows(part) for row in batch) == list(range(100))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_remaining_requests_keep_their_batches_at_any_number_of_ranks(dp_size: int) -> None:
    """Batches with other rows would round differently and could change an answer."""
    done = {(row, 0, 0) for row in (*range(0, 100, 9), *range(40))}
    left = [batch for rank in range(dp_size) for batch in rows(share(REQUESTS, 3, done, rank, dp_size))]
    whole = rows(batches(REQUESTS, 3))
    assert all(batch in whole for batch in left)
    assert {row for batch in left for row in batch} >= {row for row in range(100) if (row, 0, 0) not in done}
    assert all(any((row, 0, 0) not in done for row in batch) for batch in left)


def test_batches_hold_every_request_once_sorted_by_length() -> None:
    found = list(batches(REQUESTS, 3))
    assert sorted(request.row for batch in found for request in batch) == list(range(100))
    lengths = [len(request.context) for batch in found[:32] for request in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_all_answers_reach_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "k" * 16, 0)
    assert answer_all(Echo(), batches(REQUESTS, 3), journal, StopRequest(), show_progress=False)
    assert {place: done.response for place, done in read_answers(journal, REQUESTS).items()} == {
        (row, 0, 0): str(row) for row in range(100)
    }


def test_a_stop_request_leaves_finished_batches_in_the_journal(tmp_path: Path) -> None:
    stop = StopRequest(max_seconds=3600)
    engine = Echo(stop)
    journal = Journal(tmp_path, "k" * 16, 0)
    assert not answer_all(engine, batches(REQUESTS, 3), journal, stop, show_progress=False)
    assert len(engine.calls) == 2
    assert len(journal.read()) == 6
    # Another rank that got no signal stops at its next batch.
    other = Echo()
    assert not answer_all(other, batches(REQUESTS, 3), Journal(tmp_path, "k" * 16, 1), StopRequest(), False)
    assert len(other.calls) == 1
