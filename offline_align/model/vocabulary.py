"""The output layer and its cross-entropy as one operation, piece by piece.

Shape legend: N targets, n targets of a piece, C hidden width, V vocabulary rows of this rank.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from offline_align.estimate.sizes import LOGITS_KEPT_BYTES, LOGITS_PIECE_BYTES
from offline_align.model.backend import has_kernels
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
    and made again where not, so that never more than one piece is in memory. Weights of targets are multiplied
    onto rows [C], not onto rows of the vocabulary. With a sharded vocabulary a piece costs two all-reduces of a few
    bytes a target.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> Tensor:
        kept_bytes = hidden.size(0) * weight.size(0) * weight.element_size()
        keeps = ctx.needs_input_grad[0] and kept_bytes <= LOGITS_KEPT_BYTES
        # Kernels put what is kept where the logits were: then pieces would save nothing.
        rows = max(1, hidden.size(0)) if keeps and has_kernels(weight) else _rows_of_piece(weight)
        first_row = group.rank() * weight.size(0)
        local, ctx.num_tokens = ids - first_row, vocab_size - first_row
        log_sum, target = hidden.new_empty((2, hidden.size(0)), dtype=torch.float32).unbind(0)
        kept = []
        for piece in _pieces(hidden.size(0), rows):
            scores = _scores(hidden[piece], weight, ctx.num_tokens, local[piece], group.size() > 1)
            log_sum[piece], target[piece] = _over_vocabulary(scores.log_sum, scores.target, group)
            if keeps:
                kept.append(scores.residual(log_sum[piece]))
            del scores
        ctx.save_for_backward(hidden, weight, local, log_sum)
        ctx.rows, ctx.weight, ctx.is_shared, ctx.kept = rows, weight, group.size() > 1, kept
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, nll_grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, local, log_sum = ctx.saved_tensors
        hidden_grad, total = torch.empty_like(hidden), getattr(ctx.weight, "main_grad", None)
        weight_grad = torch.zeros_like(weight) if total is None else total
        weighted = (hidden * nll_grad[:, None]).to(weight.dtype)
        for piece in _pieces(hidden.size(0), ctx.rows):
            if ctx.kept:
                # Let go when it has been used: autograd is given a tensor as large as the weight in the end.
                residual = ctx.kept.pop(0)
            else:
                scores = _scores(hidden[piece], weight, ctx.num_tokens, local[piece], ctx.is_shared)
                residual = scores.residual(log_sum[piece])
            torch.mm(residual, weight, out=hidden_grad[piece])
            add_product(weight_grad, residual, weighted[piece])
            del residual
        if total is not None:
            weight_grad = added(ctx.weight)
        return hidden_grad * nll_grad[:, None].to(hidden.dtype), weight_grad, None, None, None


def _rows_of_piece(weight: Tensor) -> int:
    return max(1, LOGITS_PIECE_BYTES[weight.device.type] // (4 * weight.size(0)))


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


class _Scores(Protocol):
    """Logits of a piece, on this rank's rows of the vocabulary."""

    log_sum: Tensor
    """Log-sum-exp over these rows: [n] in fp32."""
    target: Tensor
    """Logits of the targets [n] in fp32, 0 of those that other ranks have."""

    def residual(self, log_sum: Tensor) -> Tensor:
        """Return softmax less one at the target, [n, V], from `log_sum` [n] of the whole vocabulary; asked once."""


def _scores(hidden: Tensor, weight: Tensor, num_tokens: int, local: Tensor, is_shared: bool) -> _Scores:
    logits = _logits(hidden, weight, num_tokens)
    return _ByKernels(logits, local) if has_kernels(weight) else _ByTorch(logits, local, is_shared)


class _ByTorch:
    """In fp32, by operations of torch."""

    def __init__(self, logits: Tensor, local: Tensor, is_shared: bool) -> None:
        self._dtype, self._is_shared = logits.dtype, is_shared
        self._is_own = (local >= 0) & (local < logits.size(1))
        # Targets of other ranks' rows read row 0 here, and count nothing.
        self._local = torch.where(self._is_own, local, 0)[:, None]
        self._probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
        # The largest probability is one over the sum of exponentials above the highest logit: two maxima are enough.
        self.log_sum = logits.amax(1).float() - self._probabilities.amax(1).log()
        self.target = torch.where(self._is_own, logits.gather(1, self._local)[:, 0].float(), 0.0)

    def residual(self, log_sum: Tensor) -> Tensor:
        found = self._probabilities
        if self._is_shared:
            found.mul_((self.log_sum - log_sum).exp()[:, None])
        return found.scatter_add_(1, self._local, -self._is_own[:, None].float()).to(self._dtype)


class _ByKernels:
    """In the place of the logits."""

    def __init__(self, logits: Tensor, local: Tensor) -> None:
        from offline_align.model import kernels

        self._logits, self._local, self._kernels = logits, local, kernels
        self.log_sum, self.target = kernels.log_sum(logits, local)

    def residual(self, log_sum: Tensor) -> Tensor:
        self._kernels.residual_(self._logits, log_sum, self._local)
        return self._logits


def _over_vocabulary(own_log_sum: Tensor, own_target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp over the whole vocabulary and the logit of the target: [n] each, in fp32."""
    if group.size() == 1:
        return own_log_sum, own_target
    highest = own_log_sum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((own_log_sum - highest).exp(), own_target))
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
