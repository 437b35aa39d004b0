"""The output layer and its cross-entropy as one operation, piece by piece.

Shape legend: N targets, n targets of a piece, C hidden width, V vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from offline_align.distributed.sizes import LOGITS_KEPT_BYTES, LOGITS_PIECE_BYTES
from offline_align.model.weight_gradients import add_product, added


def target_nll(hidden: Tensor, weight: Tensor, ids: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """Return `-log softmax(hidden @ weight.T)[id]` of each target: [N] in fp32, from [N, C], [V, C] and [N].

    `group` are the ranks that share the vocabulary, each holding V rows of it in the order of ranks. Rows from
    `vocab_size` on are there to divide the vocabulary evenly: they stand for no token and have no probability.
    """
    nll: Tensor = _TargetNll.apply(hidden, weight, ids, group, vocab_size)  # type: ignore[no-untyped-call]
    return nll


class _TargetNll(torch.autograd.Function):
    """What the backward pass multiplies by is made in the forward pass, where the logits are at hand.

    That is `softmax - one at the target`, in the model's precision; it is kept where all of it fits LOGITS_KEPT_BYTES,
    and made again where not, so that never more than one piece of fp32 is in memory. Weights of targets are multiplied
    onto rows [C], not onto rows of the vocabulary. With a sharded vocabulary a piece costs two all-reduces of a few
    bytes a target.
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
            own = None if is_own is None else is_own[piece]
            logits = _logits(hidden[piece], weight, ctx.num_tokens)
            probabilities, own_log_sum = _softmax(logits)
            log_sum[piece], target[piece] = _over_vocabulary(
                own_log_sum, logits.gather(1, local[piece, None])[:, 0], own, group
            )
            del logits
            if keeps:
                residual = _residual(probabilities, own_log_sum - log_sum[piece], local[piece], own)
                kept.append(residual.to(weight.dtype))
        ctx.save_for_backward(hidden, weight, local, is_own, log_sum, *kept)
        ctx.rows, ctx.weight = rows, weight
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, local, is_own, log_sum, *kept = ctx.saved_tensors
        hidden_grad, total = torch.empty_like(hidden), getattr(ctx.weight, "main_grad", None)
        weight_grad = torch.zeros_like(weight) if total is None else total
        weighted = (hidden * nll_grad[:, None]).to(weight.dtype)
        for number, piece in enumerate(_pieces(hidden.size(0), ctx.rows)):
            if kept:
                residual = kept[number]
            else:
                own = None if is_own is None else is_own[piece]
                probabilities, own_log_sum = _softmax(_logits(hidden[piece], weight, ctx.num_tokens))
                residual = _residual(probabilities, own_log_sum - log_sum[piece], local[piece], own)
                residual = residual.to(weight.dtype)
            torch.mm(residual, weight, out=hidden_grad[piece])
            add_product(weight_grad, residual, weighted[piece])
        if total is not None:
            weight_grad = added(ctx.weight)
        return hidden_grad * nll_grad[:, None].to(hidden.dtype), weight_grad, None, None, None


def _pieces(count: int, rows: int) -> list[slice]:
    return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]


def _logits(hidden: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """Return [n, V] logits; those of rows from `num_tokens` on, which no token has, are as low as can be.

    They are finite, for a rank may hold no other rows, and would find a maximum of minus infinity.
    """
    logits = hidden @ weight.t()
    if num_tokens < weight.size(0):
        logits[:, max(num_tokens, 0) :] = torch.finfo(logits.dtype).min
    return logits


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax [n, V] over this rank's rows and its log-sum-exp [n], both in fp32.

    The largest probability is one over the sum of exponentials above the highest logit: two maxima are all it takes.
    """
    probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
    return probabilities, logits.amax(1).float() - probabilities.amax(1).log()


def _residual(probabilities: Tensor, log_share: Tensor, local: Tensor, is_own: Tensor | None) -> Tensor:
    """Return softmax over the whole vocabulary less one at the target: [n, V], in place.

    `log_share` [n] is the logarithm of this rank's share of the sum of exponentials.
    """
    if is_own is None:
        return probabilities.scatter_add_(1, local[:, None], -torch.ones_like(log_share)[:, None])
    probabilities.mul_(log_share.exp()[:, None])
    return probabilities.scatter_add_(1, local[:, None], -is_own[:, None].float())


def _over_vocabulary(
    own_log_sum: Tensor, own_target: Tensor, is_own: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp over the whole vocabulary and the logit of the target: [n] each, in fp32."""
    if is_own is None:
        return own_log_sum, own_target.float()
    highest = own_log_sum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((own_log_sum - highest).exp(), torch.where(is_own, own_target.float(), 0.0)))
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
