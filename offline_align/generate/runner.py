"""The loop over a rank's share of the requests: batches of similar length, with answers journalled."""

import logging
from collections.abc import Collection, Sequence
from itertools import chain

from offline_align.data.journal import Journal
from offline_align.distributed.stopping import StopRequest
from offline_align.generate.answer_journal import Place, append_answers, missing
from offline_align.generate.requests import Engine, Request
from offline_align.progress import Meter
from offline_align.wording import pace

logger = logging.getLogger(__name__)

# Requests are sorted by length within a window of this many batches: enough for little padding, and few
# enough to roughly keep the order.
_WINDOW_BATCHES = 32


def batches(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Return batches of similar context length, the longest first, so that OOM errors occur early.

    Requests are sorted within a window of batches.

    Batches depend only on the requests, not on ranks or existing answers. An answer is therefore
    the same to the bit in a run that was interrupted.
    """
    window = batch_size * _WINDOW_BATCHES
    found = []
    for start in range(0, len(requests), window):
        ordered = sorted(requests[start : start + window], key=lambda request: -len(request.context))
        found += [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    return found


def share(
    requests: Sequence[Request], batch_size: int, done: Collection[Place], dp_rank: int, dp_size: int
) -> list[list[Request]]:
    """Return the batches of one data parallel rank: every `dp_size`-th of those with a missing answer."""
    left = [batch for batch in batches(requests, batch_size) if missing(batch, done)]
    return left[dp_rank::dp_size]


def answer_all(
    engine: Engine, own: Sequence[list[Request]], journal: Journal, stop: StopRequest, show_progress: bool
) -> bool:
    """Answer the batches and journal the answers; return False if a stop was requested before the last one.

    A stop request on one rank reaches the others through a file in the journal, without a
    collective per batch.
    """
    tokens, total = 0, sum(map(len, own))
    with Meter("generating", total, "answers", enabled=show_progress) as meter:
        for answers in chain.from_iterable(engine.answers(batch) for batch in own):
            append_answers(journal, answers)
            tokens += sum(answer.num_tokens for answer in answers)
            meter.advance(len(answers), note=pace(tokens / meter.seconds, "tokens"))
            if stop.reason is not None:
                journal.ask_to_stop()
            if meter.done < total and journal.stop_is_asked():
                return False
    return True
