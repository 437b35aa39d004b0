"""The loop over a rank's share of the requests: batches of like length, each journalled when it is done."""

import logging
from collections.abc import Iterator, Sequence

from offline_align.distributed.stopping import StopRequest
from offline_align.generate.journal import Journal
from offline_align.generate.requests import Engine, Request
from offline_align.progress import Meter

logger = logging.getLogger(__name__)

# Batches whose requests are sorted by length together: enough to pad little, few enough to keep the order.
_WINDOW_BATCHES = 32


def share(requests: Sequence[Request], dp_rank: int, dp_size: int) -> list[Request]:
    """Return the requests of one data-parallel rank: every `dp_size`-th, so that lengths are alike on all."""
    return list(requests[dp_rank::dp_size])


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Yield batches of like context length, the longest of a window first: too long a batch fails early."""
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(requests), window):
        ordered = sorted(requests[start : start + window], key=lambda request: -len(request.context))
        for first in range(0, len(ordered), batch_size):
            yield ordered[first : first + batch_size]


def answer_all(
    engine: Engine, requests: Sequence[Request], journal: Journal, stop: StopRequest, show_progress: bool
) -> bool:
    """Answer the requests and journal them; return False where a stop was asked for before the end."""
    tokens = 0
    with Meter("generate", len(requests), "rows", enabled=show_progress) as meter:
        for batch in batches(requests, engine.batch_size):
            if stop.reason is not None:
                return False
            answers = engine.complete(batch)
            journal.append(answers)
            tokens += sum(answer.num_tokens for answer in answers)
            per_row = tokens / (meter.done + len(batch))
            meter.advance(len(batch), note=f"{per_row * meter.rate:.0f} tokens/s")
    return True
