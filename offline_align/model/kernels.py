"""Triton kernels that fuse sequences of memory-bound operations; for CUDA, if Triton can compile.

Each kernel is registered as a torch custom operator, so it also works on fake tensors.
Shape legend: T tokens of the bin, G key/value heads of this rank, E query heads per key/value head,
H = G * E, D width of a head; n targets of a chunk, V vocabulary rows of this rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VOCABULARY_BLOCK = 4096


@torch.library.custom_op("offline_align::split_heads", mutates_args=())
def split_heads(mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [T, H, D], key and value [T, G, D] of a projection [T, G * (E + 2) * D].

    Query and key are rotated by the angles of each token, whose `cosine` and `sine` are [T, D / 2]; the
    rotated pairs are (d, d + D / 2). The results do not share memory with the projection, so it can be
    freed.
    """
    width = 2 * cosine.size(-1)
    query, key, value = (mixed.new_empty(shape) for shape in _shapes(mixed, width, groups))
    _launch_heads(mixed, query, key, value, cosine, sine, joins=False)
    return query, key, value


@split_heads.register_fake
def _(mixed: Tensor, cosine: Tensor, sine: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (mixed.new_empty(shape) for shape in _shapes(mixed, 2 * cosine.size(-1), groups))
    return query, key, value


@torch.library.custom_op("offline_align::join_heads", mutates_args=())
def join_heads(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the gradient of the projection [T, G * (E + 2) * D] from those of the outputs of `split_heads`."""
    mixed = query.new_empty(_joined(query, key))
    _launch_heads(mixed, query.contiguous(), key.contiguous(), value.contiguous(), cosine, sine, joins=True)
    return mixed


@join_heads.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return query.new_empty(_joined(query, key))


@torch.library.custom_op("offline_align::log_sum", mutates_args=())
def log_sum(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row of `logits` [n, V] and its logit at `local` [n]: [n] each, in fp32.

    An index outside 0 to V - 1 belongs to a target of another rank; its logit is 0.
    """
    count, vocabulary = logits.shape
    sums, target = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    if count:
        _log_sum_kernel[count,](logits, local, sums, target, vocabulary, block=_VOCABULARY_BLOCK, num_warps=8)
    return sums, target


@log_sum.register_fake
def _(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    sums = logits.new_empty(logits.size(0), dtype=torch.float32)
    return sums, torch.empty_like(sums)


@torch.library.custom_op("offline_align::residual_", mutates_args=("logits",))
def residual_(logits: Tensor, log_sums: Tensor, local: Tensor) -> None:
    """Overwrite `logits` [n, V] with `exp(logits - log_sums)`, minus 1 at the index `local` of each row."""
    count, vocabulary = logits.shape
    if count:
        grid = (count, triton.cdiv(vocabulary, _VOCABULARY_BLOCK))
        _residual_kernel[grid](logits, log_sums, local, vocabulary, block=_VOCABULARY_BLOCK, num_warps=8)


@residual_.register_fake
def _(logits: Tensor, log_sums: Tensor, local: Tensor) -> None:
    pass


def _shapes(mixed: Tensor, width: int, groups: int) -> list[tuple[int, int, int]]:
    tokens, heads = mixed.size(0), mixed.size(-1) // width - 2 * groups
    return [(tokens, heads, width), (tokens, groups, width), (tokens, groups, width)]


def _joined(query: Tensor, key: Tensor) -> tuple[int, int]:
    return query.size(0), (query.size(1) + 2 * key.size(1)) * query.size(2)


def _launch_heads(
    mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, joins: bool
) -> None:
    tokens, heads, width = query.shape
    groups = key.size(1)
    slots = heads + 2 * groups
    if tokens:
        _heads_kernel[tokens,](
            mixed,
            query,
            key,
            value,
            cosine,
            sine,
            each=heads // groups,
            groups=groups,
            width=width,
            slots=triton.next_power_of_2(slots),
            lanes=triton.next_power_of_2(width // 2),
            joins=joins,
            num_warps=8,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _heads_kernel(
    mixed: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    each: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    slots: tl.constexpr,
    lanes: tl.constexpr,
    joins: tl.constexpr,
) -> None:
    """Process one token. In the projection, each group has E queries, a key and a value side by side."""
    half: tl.constexpr = width // 2
    token = tl.program_id(0).to(tl.int64)
    slot, lane = tl.arange(0, slots)[:, None], tl.arange(0, lanes)[None, :]
    group, place = slot // (each + 2), slot % (each + 2)
    inside = (slot < groups * (each + 2)) & (lane < half)
    is_query, is_key, is_value = inside & (place < each), inside & (place == each), inside & (place == each + 1)
    at = token * groups * (each + 2) * width + slot * width + lane
    at_query = token * groups * each * width + (group * each + place) * width + lane
    at_key = token * groups * width + group * width + lane
    cos = tl.load(cosine + token * half + lane, mask=lane < half, other=0.0).to(tl.float32)
    sin = tl.load(sine + token * half + lane, mask=lane < half, other=0.0).to(tl.float32)
    if joins:
        # The three masks are disjoint and masked lanes load 0, so each sum has one term.
        first = tl.load(query + at_query, mask=is_query, other=0.0).to(tl.float32)
        first += tl.load(key + at_key, mask=is_key, other=0.0).to(tl.float32)
        first += tl.load(value + at_key, mask=is_value, other=0.0).to(tl.float32)
        second = tl.load(query + at_query + half, mask=is_query, other=0.0).to(tl.float32)
        second += tl.load(key + at_key + half, mask=is_key, other=0.0).to(tl.float32)
        second += tl.load(value + at_key + half, mask=is_value, other=0.0).to(tl.float32)
        sin = -sin
    else:
        first = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(mixed + at + half, mask=inside, other=0.0).to(tl.float32)
    is_rotated = place <= each
    left = tl.where(is_rotated, first * cos - second * sin, first)
    right = tl.where(is_rotated, second * cos + first * sin, second)
    if joins:
        tl.store(mixed + at, left, mask=inside)
        tl.store(mixed + at + half, right, mask=inside)
    else:
        tl.store(query + at_query, left, mask=is_query)
        tl.store(query + at_query + half, right, mask=is_query)
        tl.store(key + at_key, left, mask=is_key)
        tl.store(key + at_key + half, right, mask=is_key)
        tl.store(value + at_key, left, mask=is_value)
        tl.store(value + at_key + half, right, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum_kernel(
    logits: tl.tensor, local: tl.tensor, sums: tl.tensor, target: tl.tensor, vocabulary: tl.tensor, block: tl.constexpr
) -> None:
    """Process one row in one pass: each lane has a running maximum and a sum of exponentials relative to it."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    # The initial maximum is finite: lanes without a logit would otherwise compute -inf - (-inf) = NaN.
    highest = tl.full([block], -1e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    for first in range(0, vocabulary, block):
        x = tl.load(logits + row * vocabulary + first + lane, mask=first + lane < vocabulary, other=-float("inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(sums + row, top + tl.log(tl.sum(total * tl.exp(highest - top), 0)))
    place = tl.load(local + row)
    is_own = (place >= 0) & (place < vocabulary)
    tl.store(target + row, tl.load(logits + row * vocabulary + place, mask=is_own, other=0.0).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator]
def _residual_kernel(
    logits: tl.tensor, log_sums: tl.tensor, local: tl.tensor, vocabulary: tl.tensor, block: tl.constexpr
) -> None:
    """Process one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = logits + row * vocabulary + column
    x = tl.load(at, mask=column < vocabulary, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(log_sums + row))
    tl.store(at, tl.where(column == tl.load(local + row), p - 1.0, p), mask=column < vocabulary)
