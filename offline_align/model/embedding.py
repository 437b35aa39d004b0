"""The embedding, whose backward pass adds to `main_grad` directly.

With autograd alone, a backward pass fills a gradient of the size of the whole embedding matrix, almost
all of it zeros, and a hook adds it to `main_grad`, the sum over micro-batches. Here the backward pass
adds only the rows of the bin's tokens to that sum.

Shape legend: T tokens of the bin, V rows of the vocabulary on this rank, C hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from offline_align.model.weight_gradients import added


class PackedEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """megatron's vocabulary parallel embedding with a gradient for only the rows that were looked up."""

    def forward(self, input_: Tensor) -> Tensor:
        """Return [1, T, C] from [1, T]; under sequence parallelism, this rank's slice of [T, 1, C]."""
        outside, ids = None, input_
        if self.tp_group.size() > 1:
            outside = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            ids = (input_ - self.vocab_start_index).masked_fill(outside, 0)
        rows: Tensor = _Lookup.apply(self.weight, ids)  # type: ignore[no-untyped-call]
        if outside is not None:
            rows = rows.masked_fill(outside.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            out: Tensor = reduce_scatter_to_sequence_parallel_region(
                rows.transpose(0, 1).contiguous(), group=self.tp_group
            )
            return out
        reduced: Tensor = reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
        return reduced


def convert_to_packed(embedding: VocabParallelEmbedding) -> None:
    """Turn an embedding that megatron has built into a PackedEmbedding, in place.

    megatron's layer specifications have no entry for the embedding.
    """
    embedding.__class__ = PackedEmbedding
    # If the weight is tied to the output layer, megatron would otherwise add the placeholder that
    # autograd gets instead of a gradient.
    embedding.weight.zero_out_wgrad = False


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        total = getattr(ctx.weight, "main_grad", None)
        if total is None:
            return _add_rows(torch.zeros_like(ctx.weight), ids, grad), None
        _add_rows(total, ids, grad)
        return added(ctx.weight), None


def _add_rows(total: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    """Add `grad` [1, T, C] to the rows `ids` [1, T] of `total` [V, C], in the same order in every run."""
    rows, values = ids.flatten(), grad.flatten(0, 1).to(total.dtype)
    # `index_put_` adds in a fixed order on a GPU, and `index_add_` on the CPU; not the other way round.
    return total.index_put_((rows,), values, accumulate=True) if total.is_cuda else total.index_add_(0, rows, values)
