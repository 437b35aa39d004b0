"""Answers of all ranks to the requests of a rollout, on every rank, continued from a journal."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

from offline_align.data.journal import Journal
from offline_align.distributed.stopping import StopRequest
from offline_align.errors import StoppedEarly
from offline_align.generate.answer_journal import Place, missing, read_answers
from offline_align.generate.requests import Completion, Engine, Request
from offline_align.generate.runner import answer_all, share
from offline_align.wording import counted

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks


def rollout(
    engine: Engine, requests: Sequence[Request], journal: Journal, ranks: "Ranks", stop: StopRequest
) -> list[Completion]:
    """Return the answers to `requests` in their order, on every rank. All ranks must call it.

    Every rank holds the whole policy, so the requests are shared by all ranks, whatever their group.
    `journal` is this rank's (`ranks.rank`). Its key must cover all that decides the answers: the
    weights, the seed, the settings and the prompts. Answers in it are not computed again. Batches
    depend on the requests alone, so the result is the same to the bit after an interruption.
    Raises StoppedEarly on all ranks, with the finished answers on disk, if one was asked to stop.
    """

    def look() -> dict[Place, Completion]:
        journal.forget_stop()
        return read_answers(journal, requests)

    done = ranks.from_main(look)
    if missing(requests, done):
        size = balanced_batch_size(len(requests), engine.batch_size, ranks.world_size)
        own = share(requests, size, done, ranks.rank, ranks.world_size)
        finished = ranks.gather(answer_all(engine, own, journal, stop, ranks.is_main))
        done = ranks.from_main(lambda: read_answers(journal, requests))
        if not all(finished):
            raise StoppedEarly(
                f"stopped after {len(done):,} of {counted(len(requests), 'answer')} of a rollout, which are saved: "
                "run the same command to continue"
            )
    return [done[request.row, request.variant, request.sample_index] for request in requests]


def balanced_batch_size(requests: int, most: int, ranks: int) -> int:
    """Return a size of at most `most` with which every rank gets as many batches, of nearly equal size."""
    rounds = ceil(requests / (most * ranks))
    return ceil(requests / (ranks * rounds))
