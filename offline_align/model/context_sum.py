"""Sums over the ranks that share a bin under context parallelism."""

from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def over_context_ranks(own: Tensor) -> Tensor:
    """Return the sum of `own` [S] over the context parallel ranks, on each of them.

    The backward pass adds the gradients of all ranks, so a loss that only one rank computes reaches
    the parts of the others. All ranks of the group must take part in both passes.
    """
    group = parallel_state.get_context_parallel_group()
    gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(own, group=group)
    return gathered.view(group.size(), -1).sum(0)
