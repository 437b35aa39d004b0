"""Log-likelihoods of whole answers, from the negative log-likelihoods of their tokens.

Shape legend: N targets of this rank, S segments of the bin.
"""

import torch
from torch import Tensor

from offline_align.data.batch import PackedBatch
from offline_align.model.context_sum import over_context_ranks


def answer_likelihoods(nll: Tensor, batch: PackedBatch) -> Tensor:
    """Return the log-likelihood in nats of the targets of each segment, [S] in fp64.

    `nll` is [N]. The sum of a segment is computed in order, in fp64, so it has the same bits in every
    run. Under context parallelism, every rank gets the sums over the whole bin.
    """
    return -_by_segment(nll, batch)


def answer_lengths(batch: PackedBatch) -> Tensor:
    """Return the number of targets of each segment of the whole bin, [S] in fp64."""
    counts = batch.target_counts.double()
    return counts if batch.last_is_here is None else over_context_ranks(counts)


def _by_segment(values: Tensor, batch: PackedBatch) -> Tensor:
    # `unsafe` leaves out checks of the lengths that would make the host wait for the device.
    own = torch.segment_reduce(values.double(), "sum", lengths=batch.target_counts, unsafe=True, initial=0.0)
    return own if batch.last_is_here is None else over_context_ranks(own)
