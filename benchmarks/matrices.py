"""The limit: only the matrix products that the result needs, on the same bins, into preallocated memory.

A prompt shared by both answers of a pair is computed once, and the last layer's MLP runs only on the
positions that the head reads.
Shape legend: T tokens of a bin, N targets, C hidden width, F inner width, V vocabulary, L tokens of a
row, H heads, D width of a head.
"""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import median_seconds, report
from benchmarks.workload import GLOBAL_BATCH, MAX_LENGTH, in_bf16, load
from offline_align.data.loader import rows_of_step
from offline_align.data.pack import pack

Product = tuple[Tensor, Tensor, Tensor]
Row = tuple[int, int]
"""Number of tokens of a row that are computed, and number of tokens that they attend to."""


def training(workload: str, scratch: str, name: str) -> None:
    """Measure the products of the second epoch of SFT.

    Each linear layer has three products (forward, and two in the backward pass). The output layer
    runs on targets only.
    """
    rows = load(Path(workload) / f"{name}_tokens.json")
    targets = [len(r["ids"]) - r["target_start"] for r in rows]
    groups = _sides(workload, "preference") if name == "answers" else [[(len(r["ids"]), len(r["ids"]))] for r in rows]
    size = len(rows) // len(groups)
    read = [sum(targets[i * size : (i + 1) * size]) for i in range(len(groups))]
    bins = list(_bins_of_steps([sum(own for own, _ in group) for group in groups], GLOBAL_BATCH // size))
    computed = [[row for i in b for row in groups[i]] for b in bins]
    _measure(workload, computed, [sum(read[i] for i in b) for b in bins], True, True, "targets_per_second", sum(read))


def pairs(workload: str, scratch: str) -> None:
    """Measure the products of the second epoch of a reward model, which has no output layer."""
    sides = _sides(workload)
    bins = list(_bins_of_steps([sum(own for own, _ in pair) for pair in sides]))
    rows = [[row for i in b for row in sides[i]] for b in bins]
    _measure(workload, rows, [2 * len(b) for b in bins], False, True, "pairs_per_second", len(sides))


def preference(workload: str, scratch: str) -> None:
    """Measure the products of the second epoch of DPO, whose output layer runs on both answers."""
    sides = _sides(workload, "preference")
    targets = [
        len(pair["chosen"]) + len(pair["rejected"]) - 2 * pair["target_start"]
        for pair in load(Path(workload) / "preference_tokens.json")
    ]
    bins = list(_bins_of_steps([sum(own for own, _ in pair) for pair in sides]))
    rows = [[row for i in b for row in sides[i]] for b in bins]
    read = [sum(targets[i] for i in b) for b in bins]
    _measure(workload, rows, read, True, True, "pairs_per_second", len(sides))


def scoring(workload: str, scratch: str, rows: str) -> None:
    """Measure the products of one forward pass over all rows."""
    lengths = [len(r["ids"]) for r in load(Path(workload) / f"scored_{rows}_tokens.json")]
    groups = _sides(workload) if rows == "answers" else [[(n, n)] for n in lengths]
    packed = pack([sum(own for own, _ in group) for group in groups], MAX_LENGTH)
    bins = [[row for i in b for row in groups[i]] for b in packed if b]
    _measure(workload, bins, [len(b) for b in bins], False, False, "tokens_per_second", sum(lengths))


def _sides(workload: str, pairs: str = "pairs") -> list[list[Row]]:
    """Return the two rows of each pair, the second without its common prefix with the first."""
    sides: list[list[Row]] = []
    for pair in load(Path(workload) / f"{pairs}_tokens.json"):
        chosen, rejected = pair["chosen"], pair["rejected"]
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected[:-1], strict=False)))
        sides.append([(len(chosen), len(chosen)), (len(rejected) - shared, len(rejected))])
    return sides


def _bins_of_steps(lengths: list[int], batch: int = GLOBAL_BATCH) -> Iterator[list[int]]:
    count = len(lengths)
    for step in range(count // batch, 2 * count // batch):
        rows = rows_of_step(step, batch, count, 2 * count, seed=1234)
        yield from ([rows[i] for i in b] for b in pack([lengths[r] for r in rows], MAX_LENGTH) if b)


def _measure(
    workload: str, bins: list[list[Row]], read: list[int], vocabulary: bool, backward: bool, unit: str, count: int
) -> None:
    config = json.loads((Path(workload) / "model" / "config.json").read_text(encoding="utf-8"))
    if in_bf16(workload):
        torch.set_default_dtype(torch.bfloat16)
    work = [products(config, rows, n, vocabulary, backward) for rows, n in zip(bins, read, strict=True)]

    def everything() -> None:
        for products_of_bin in work:
            multiply(products_of_bin, config["num_hidden_layers"])

    seconds = median_seconds(everything, 3 if not backward else 1)
    report(**{unit: count / seconds, "seconds": seconds})


def multiply(products: list[Product], layers: int) -> None:
    """Compute the products of a bin once per layer."""
    for left, right, out in products * layers:
        torch.matmul(left, right, out=out)


def products(config: dict[str, int], rows: list[Row], read: int, vocabulary: bool, backward: bool) -> list[Product]:
    """Return the products of one layer on a bin of `rows`, of which the head reads `read` positions.

    The output layer, and the positions that the last layer skips, are spread evenly over all layers.
    """
    hidden, ffn, heads = (config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    tokens, layers = sum(own for own, _ in rows), config["num_hidden_layers"]
    inner = -(-(tokens * (layers - 1) + read) // layers)
    shapes = [
        (tokens, hidden, 3 * hidden),
        (tokens, hidden, hidden),
        (inner, hidden, 2 * ffn),
        (inner, ffn, hidden),
        *([(-(-read // layers), hidden, config["vocab_size"])] if vocabulary else []),
    ]
    found = [p for shape in shapes for p in _linear(*shape, backward)]
    for own, seen in rows:
        query, key = torch.randn(heads, own, hidden // heads), torch.randn(heads, seen, hidden // heads)
        scores = torch.randn(heads, own, seen)
        for _ in range(3 if backward else 1):
            found += [(query, key.transpose(1, 2), scores.clone()), (scores, key, torch.empty_like(query))]
    return found


def _linear(tokens: int, inside: int, outside: int, backward: bool) -> list[Product]:
    x, weight, grad = torch.randn(tokens, inside), torch.randn(outside, inside), torch.randn(tokens, outside)
    forward = [(x, weight.t(), torch.empty(tokens, outside))]
    back = [(grad, weight, torch.empty(tokens, inside)), (grad.t(), x, torch.empty(outside, inside))]
    return forward + (back if backward else [])
