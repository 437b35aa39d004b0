"""Attention over the rows of a bin on the CPU as batched matrix products that skip most masked scores.

torch's fused kernel does not save the attention probabilities, which would be large for long rows, and
recomputes them in the backward pass. Rows of some hundred tokens train a quarter faster with saved
probabilities (docs/benchmarks.md). Without gradients nothing is saved, and the fused kernel is as fast.
Answers that attend to a shared prompt are the exception: there the fused kernel needs an explicit mask
and also computes the masked scores.

Shape legend: T queries of the bin, K keys, H query heads of this rank, G key/value heads, R = H / G,
D width of a head, l queries of a block.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

LONGEST_ROW = 1024
"""Longest row, in tokens, that is computed by products.

The saved probabilities grow with the square of the length. At this length and with heads of width 32,
they take as much memory as everything else that a layer saves; with heads of width 128, a fifth.
"""

# Queries per block. Larger blocks would compute more scores that the mask hides.
_BLOCK = 128


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Sequence[int], Sequence[int]], scale: float
) -> Tensor:
    """Return [T, H, D] from query [T, H, D] and key, value [K, G, D], causal in each row.

    `lengths` are the numbers of queries and of keys of each row. The queries of a row are its last
    positions.
    """
    out: Tensor = _Attention.apply(query, key, value, lengths, scale)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[Sequence[int], Sequence[int]], scale: float
    ) -> Tensor:
        groups = key.size(1)
        query, key, value = _by_group(query * scale, groups), _by_group(key, groups), _by_group(value, groups)
        out = torch.empty_like(query)
        kept = []
        for rows, keys in _blocks(*lengths):
            q, k, v = _matrix(query[:, :, rows]), key[:, 0, keys], value[:, 0, keys]
            scores = torch.bmm(q, k.transpose(1, 2))
            # The queries are the last positions of their keys, so the mask is a triangle at the end.
            count = rows.stop - rows.start
            scores.view(scores.size(0), -1, count, scores.size(2))[..., -count:] += _triangle()[:count, :count]
            probabilities = torch.softmax(scores, dim=-1, out=scores)
            out[:, :, rows] = torch.bmm(probabilities, v).view_as(out[:, :, rows])
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return _by_token(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        grad = _by_group(grad, key.size(0))
        query_grad = torch.empty_like(query)
        # Blocks of one row share keys, so these gradients are sums.
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for (rows, keys), probabilities in zip(_blocks(*ctx.lengths), kept, strict=True):
            q, g = _matrix(query[:, :, rows]), _matrix(grad[:, :, rows])
            k, v = key[:, 0, keys], value[:, 0, keys]
            value_grad[:, 0, keys] += torch.bmm(probabilities.transpose(1, 2), g)
            along = torch.bmm(g, v.transpose(1, 2))
            scores_grad = torch.ops.aten._softmax_backward_data(along, probabilities, -1, along.dtype)
            query_grad[:, :, rows] = torch.bmm(scores_grad, k).view_as(query_grad[:, :, rows])
            key_grad[:, 0, keys] += torch.bmm(scores_grad.transpose(1, 2), q)
        # The saved queries are scaled already, so only their own gradient needs the factor.
        query_grad *= ctx.scale
        return _by_token(query_grad), _by_token(key_grad), _by_token(value_grad), None, None


def _blocks(queries: Sequence[int], keys: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Yield, for each block, the positions of its queries and of the keys that its last query attends to."""
    first_query = first_key = 0
    for own, seen in zip(queries, keys, strict=True):
        for start in range(0, own, _BLOCK):
            stop = min(start + _BLOCK, own)
            yield (
                slice(first_query + start, first_query + stop),
                slice(first_key, first_key + seen - own + stop),
            )
        first_query, first_key = first_query + own, first_key + seen


@cache
def _triangle() -> Tensor:
    return torch.full((_BLOCK, _BLOCK), -torch.inf).triu_(1)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return a copy [G, R, T, D] of [T, H, D], in which the tokens of a head are contiguous."""
    return x.view(x.size(0), groups, -1, x.size(2)).permute(1, 2, 0, 3).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """Return [T, H, D] from [G, R, T, D]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _matrix(x: Tensor) -> Tensor:
    """Return [G, R * l, D] from [G, R, l, D], as a view if R is 1."""
    return x.squeeze(1) if x.size(1) == 1 else x.flatten(1, 2)
