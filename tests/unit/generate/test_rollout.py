from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_align.data.journal import Journal
from offline_align.distributed.setup import Ranks
from offline_align.distributed.stopping import StopRequest
from offline_align.errors import StoppedEarly
from offline_align.generate.answer_journal import append_answers
from offline_align.generate.requests import Completion, Request
from offline_align.generate.rollout import balanced_batch_size, rollout

# Rows are not in order, as after shuffled prompts.
REQUESTS = [Request(row * 7 % 30, 0, [1] * (1 + row % 5), 5) for row in range(30)]
ALONE = Ranks(0, 1, 0, 1, 0, 1, 0, 1, torch.device("cpu"))


def answer(request: Request) -> Completion:
    details: dict[str, Any] = {"token_ids": (request.row, 2), "log_probs": (-0.1 * request.row, -1.0)}
    return Completion(request.row, request.sample_index, str(request.row), "stop", 2, **details)


class Echo:
    """Answers with the row number, counts its batches, and is asked to stop in one of them."""

    def __init__(self, stop: StopRequest | None = None, batch_size: int = 4) -> None:
        self.batch_size, self.stop, self.batches = batch_size, stop, 0

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        self.batches += 1
        if self.stop is not None and self.batches == 3:
            self.stop.expect(1e9)
        yield [answer(request) for request in reversed(requests)]


def test_answers_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    found = rollout(Echo(), REQUESTS, Journal(tmp_path, "k" * 16, 0), ALONE, StopRequest())
    assert found == [answer(request) for request in REQUESTS]


def test_a_rollout_continues_with_the_answers_that_its_journal_lacks(tmp_path: Path) -> None:
    stop = StopRequest(max_seconds=3600)
    journal = Journal(tmp_path, "k" * 16, 0)
    with pytest.raises(StoppedEarly, match="12 of 30 answers of a rollout"):
        rollout(Echo(stop), REQUESTS, journal, ALONE, stop)
    again = Echo()
    assert rollout(again, REQUESTS, journal, ALONE, StopRequest()) == [answer(request) for request in REQUESTS]
    assert again.batches == 8 - 3
    complete = Echo()
    assert len(rollout(complete, REQUESTS, journal, ALONE, StopRequest())) == 30
    assert complete.batches == 0
    # Answers to other requests, such as those of another iteration, are in a journal of another name.
    other = Journal(tmp_path, "l" * 16, 0)
    assert len(rollout(again, REQUESTS, other, ALONE, StopRequest())) == 30
    assert again.batches == 5 + 8


def test_an_answer_in_the_journal_is_kept_as_it_is(tmp_path: Path) -> None:
    journal, kept = Journal(tmp_path, "k" * 16, 0), Completion(7, 0, "kept", "length", 1, 0, (9,), (-0.5,))
    append_answers(journal, [answer(request) for request in REQUESTS if request.row != 7] + [kept])
    found = rollout(Echo(), REQUESTS, journal, ALONE, StopRequest())
    assert found[1] == kept


@pytest.mark.parametrize("requests", [1, 7, 100, 128, 1000, 1024])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [4, 32, 4096])
def test_batches_are_balanced_over_ranks(requests: int, ranks: int, most: int) -> None:
    size = balanced_batch_size(requests, most, ranks)
    assert 1 <= size <= most
    starts = range(0, requests, size)
    shares = [sum(min(size, requests - start) for start in starts[rank::ranks]) for rank in range(ranks)]
    # As many batches as if all were full, and shares that differ by the rounding of their sizes alone.
    rounds = ceil(requests / (most * ranks))
    assert max(len(starts[rank::ranks]) for rank in range(ranks)) == rounds
    assert max(shares) <= requests / ranks + rounds
    if requests % (ranks * most) == 0:
        assert size == most
