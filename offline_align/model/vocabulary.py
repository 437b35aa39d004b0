"""The output layer and its cross-entropy as one operation, piece by piece.

Shape legend: N targets, n targets of a piece, C hidden width, V vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from offline_align.distributed.sizes import LOGITS_KEPT_BYTES, LOGITS_PIECE_BYTES


def target_nll(hidden: Tensor, weight: Tensor, ids: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """Return `-log softmax(hidden @ weight.T)[id]` of each target: [N] in fp32, from [N, C], [V, C] and [N].

    `group` are the ranks that share the vocabulary, each holding V rows of it in the order of ranks. Rows from
    `vocab_size` on are there to divide the vocabulary evenly: they stand for no token and have no probability.
    """
    nll: Tensor = _TargetNll.apply(hidden, weight, ids, group, vocab_size)  # type: ignore[no-untyped-call]
    return nll


class _TargetNll(torch.autograd.Function):
    """Neither probabilities nor their gradients of more than one piece are in memory at a time.

    Logits are kept for the backward pass in the model's precision where all of them fit LOGITS_KEPT_BYTES, and
    computed again where not. With a sharded vocabulary a piece costs two all-reduces of a few bytes a target.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> Tensor:
        rows = max(1, LOGITS_PIECE_BYTES[weight.device.type] // (4 * weight.size(0)))
        kept_bytes = hidden.size(0) * weight.size(0) * weight.element_size()
        keeps = ctx.needs_input_grad[0] and kept_bytes <= LOGITS_KEPT_BYTES
        first_row = group.rank() * weight.size(0)
        local, ctx.num_tokens = ids - first_row, vocab_size - first_row
        is_own = (local >= 0) & (local < weight.size(0)) if group.size() > 1 else None
        # Targets of other ranks' rows read row 0 here, and count nothing.
        local = local if is_own is None else torch.where(is_own, local, 0)
        log_sum, target = hidden.new_empty((2, hidden.size(0)), dtype=torch.float32).unbind(0)
        kept = []
        for piece in _pieces(hidden.size(0), rows):
            logits = _logits(hidden[piece], weight, ctx.num_tokens)
            log_sum[piece], target[piece] = _normaliser_and_target(
                logits, local[piece], None if is_own is None else is_own[piece], group
            )
            if keeps:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, local, is_own, log_sum, *kept)
        ctx.rows = rows
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, local, is_own, log_sum, *kept = ctx.saved_tensors
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for number, piece in enumerate(_pieces(hidden.size(0), ctx.rows)):
            logits = kept[number] if kept else _logits(hidden[piece], weight, ctx.num_tokens)
            # Of the logits: (softmax - one at the target) * gradient of the likelihood.
            grad = torch.sub(logits, log_sum[piece, None]).exp_()
            one = torch.ones_like(log_sum[piece]) if is_own is None else is_own[piece].float()
            grad.scatter_add_(1, local[piece, None], -one[:, None])
            grad = grad.mul_(nll_grad[piece, None]).to(weight.dtype)
            torch.mm(grad, weight, out=hidden_grad[piece])
            weight_grad.addmm_(grad.t(), hidden[piece])
        return hidden_grad, weight_grad, None, None, None


def _pieces(count: int, rows: int) -> list[slice]:
    return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]


def _logits(hidden: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """Return [n, V] logits; those of rows from `num_tokens` on, which no token has, are minus infinity."""
    logits = hidden @ weight.t()
    if num_tokens < weight.size(0):
        logits[:, max(num_tokens, 0) :] = -torch.inf
    return logits


def _normaliser_and_target(
    logits: Tensor, local: Tensor, is_own: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp over the whole vocabulary and the logit of the target: [n] each, in fp32."""
    target = logits.gather(1, local[:, None])[:, 0].float()
    log_sum = torch.logsumexp(logits.float(), dim=1)
    if is_own is None:
        return log_sum, target
    highest = log_sum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((log_sum - highest).exp(), torch.where(is_own, target, 0.0)))
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
