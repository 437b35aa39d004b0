"""The output layer and its cross-entropy as one operation, computed in chunks of targets.

Shape legend: N targets, n targets of a chunk, C hidden width, V vocabulary rows of this rank.
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

    The ranks of `group` share the vocabulary; each holds V rows of it, in the order of the ranks. Rows
    from `vocab_size` on are padding that makes the vocabulary divisible; they get no probability.
    """
    nll: Tensor = _TargetNll.apply(hidden, weight, ids, group, vocab_size)  # type: ignore[no-untyped-call]
    return nll


class _TargetNll(torch.autograd.Function):
    """Computes the residual for the backward pass in the forward pass, while the logits are in memory.

    The residual is `softmax - onehot(target)` in the model's precision. It is saved if all of it fits
    LOGITS_KEPT_BYTES. Otherwise the backward pass recomputes it, so that at most one chunk is in memory.
    The backward pass multiplies loss weights onto hidden states [C] and not onto logits [V], which are
    larger. With a sharded vocabulary, a chunk costs two all-reduces of a few bytes per target.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, group: dist.ProcessGroup, vocab_size: int
    ) -> Tensor:
        kept_bytes = hidden.size(0) * weight.size(0) * weight.element_size()
        keeps = ctx.needs_input_grad[0] and kept_bytes <= LOGITS_KEPT_BYTES
        # The kernels overwrite the logits with the residual, so chunks would save no memory.
        rows = max(1, hidden.size(0)) if keeps and has_kernels(weight) else _rows_of_chunk(weight)
        first_row = group.rank() * weight.size(0)
        local, ctx.num_tokens = ids - first_row, vocab_size - first_row
        log_sum, target = hidden.new_empty((2, hidden.size(0)), dtype=torch.float32).unbind(0)
        kept = []
        for chunk in _chunks(hidden.size(0), rows):
            scores = _scores(hidden[chunk], weight, ctx.num_tokens, local[chunk], group.size() > 1)
            log_sum[chunk], target[chunk] = _over_vocabulary(scores.log_sum, scores.target, group)
            if keeps:
                kept.append(scores.residual(log_sum[chunk]))
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
        for chunk in _chunks(hidden.size(0), ctx.rows):
            if ctx.kept:
                # Free each residual after its use, before a tensor of the size of the weight is
                # allocated for autograd below.
                residual = ctx.kept.pop(0)
            else:
                scores = _scores(hidden[chunk], weight, ctx.num_tokens, local[chunk], ctx.is_shared)
                residual = scores.residual(log_sum[chunk])
            torch.mm(residual, weight, out=hidden_grad[chunk])
            add_product(weight_grad, residual, weighted[chunk])
            del residual
        if total is not None:
            weight_grad = added(ctx.weight)
        return hidden_grad * nll_grad[:, None].to(hidden.dtype), weight_grad, None, None, None


def _rows_of_chunk(weight: Tensor) -> int:
    return max(1, LOGITS_PIECE_BYTES[weight.device.type] // (4 * weight.size(0)))


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]


def _logits(hidden: Tensor, weight: Tensor, num_tokens: int) -> Tensor:
    """Return [n, V] logits, with padding rows from `num_tokens` on set to the lowest finite number.

    Minus infinity would not work: a rank that holds only padding rows would have it as the maximum.
    """
    logits = hidden @ weight.t()
    if num_tokens < weight.size(0):
        logits[:, max(num_tokens, 0) :] = torch.finfo(logits.dtype).min
    return logits


class _Scores(Protocol):
    """Statistics of the logits of a chunk over this rank's rows of the vocabulary."""

    log_sum: Tensor
    """Log-sum-exp over these rows: [n] in fp32."""
    target: Tensor
    """Logits of the targets [n] in fp32, 0 for targets of other ranks."""

    def residual(self, log_sum: Tensor) -> Tensor:
        """Return `softmax - onehot(target)` [n, V], given `log_sum` [n] over the whole vocabulary.

        Can be called only once, because it may overwrite the logits.
        """


def _scores(hidden: Tensor, weight: Tensor, num_tokens: int, local: Tensor, is_shared: bool) -> _Scores:
    logits = _logits(hidden, weight, num_tokens)
    return _ByKernels(logits, local) if has_kernels(weight) else _ByTorch(logits, local, is_shared)


class _ByTorch:
    """Computes in fp32 with torch's operations."""

    def __init__(self, logits: Tensor, local: Tensor, is_shared: bool) -> None:
        self._dtype, self._is_shared = logits.dtype, is_shared
        self._is_own = (local >= 0) & (local < logits.size(1))
        # Targets of other ranks read row 0 here, and their result is masked out.
        self._local = torch.where(self._is_own, local, 0)[:, None]
        self._probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
        # The largest probability is 1 / sum(exp(logits - max)), so log-sum-exp follows from two maxima.
        self.log_sum = logits.amax(1).float() - self._probabilities.amax(1).log()
        self.target = torch.where(self._is_own, logits.gather(1, self._local)[:, 0].float(), 0.0)

    def residual(self, log_sum: Tensor) -> Tensor:
        found = self._probabilities
        if self._is_shared:
            found.mul_((self.log_sum - log_sum).exp()[:, None])
        return found.scatter_add_(1, self._local, -self._is_own[:, None].float()).to(self._dtype)


class _ByKernels:
    """Computes with Triton kernels, and writes the residual over the logits."""

    def __init__(self, logits: Tensor, local: Tensor) -> None:
        from offline_align.model import kernels

        self._logits, self._local, self._kernels = logits, local, kernels
        self.log_sum, self.target = kernels.log_sum(logits, local)

    def residual(self, log_sum: Tensor) -> Tensor:
        self._kernels.residual_(self._logits, log_sum, self._local)
        return self._logits


def _over_vocabulary(own_log_sum: Tensor, own_target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Reduce log-sum-exp and the targets' logits over the ranks that share the vocabulary: [n] each, in fp32."""
    if group.size() == 1:
        return own_log_sum, own_target
    highest = own_log_sum.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((own_log_sum - highest).exp(), own_target))
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]
