"""Results of the ranks that share a bin under context parallelism, for the whole bin."""

from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from offline_align.data.batch import PackedBatch


def over_context_ranks(own: Tensor) -> Tensor:
    """Return the sum of `own` [S] over the context parallel ranks, on each of them.

    The backward pass adds the gradients of all ranks, so a loss that only one rank computes reaches
    the parts of the others. All ranks of the group must take part in both passes.
    """
    group = parallel_state.get_context_parallel_group()
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(own, group=group)
    return gathered.view(group.size(), -1).sum(0)


def at_all_targets(own: Tensor, batch: PackedBatch) -> Tensor:
    """Return a number for each target of the whole bin, in their order, from those of this rank's targets [N].

    Under context parallelism, all ranks of the group must call this, and get the same.
    """
    if batch.target_is_here is None:
        return own
    whole = own.new_zeros(batch.target_is_here.numel())
    # Every target is on one rank, so the sum over the ranks adds only zeros to it.
    return over_context_ranks(whole.masked_scatter(batch.target_is_here, own))
