"""The limit: nothing but the matrix products of the work, on the same bins, with memory for results at hand.

Shape legend: T tokens of a bin, N targets, C hidden width, F inner width, V vocabulary, L tokens of a row, H heads,
D width of a head.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.workload import GLOBAL_BATCH, MAX_LENGTH, load
from offline_align.data.loader import rows_of_step
from offline_align.data.pack import pack

Product = tuple[Tensor, Tensor, Tensor]


def training(workload: str, scratch: str) -> None:
    """Products of the second epoch of SFT: each linear layer three times, the output layer for targets only."""
    rows = load(Path(workload) / "sft_tokens.json")
    lengths = [len(r["ids"]) for r in rows]
    targets = [len(r["ids"]) - r["target_start"] for r in rows]
    bins = list(_bins_of_steps(lengths))
    _measure(workload, bins, lengths, targets, True, "targets_per_second", sum(targets))


def pairs(workload: str, scratch: str) -> None:
    """The same for a reward model, which has no output layer."""
    rows = load(Path(workload) / "pairs_tokens.json")
    both = [len(p["chosen"]) + len(p["rejected"]) for p in rows]
    sides = [n for p in rows for n in (len(p["chosen"]), len(p["rejected"]))]
    bins = [[s for i in b for s in (2 * i, 2 * i + 1)] for b in _bins_of_steps(both)]
    _measure(workload, bins, sides, [0] * len(sides), True, "pairs_per_second", len(rows))


def scoring(workload: str, scratch: str) -> None:
    """Products of one forward pass over all rows."""
    lengths = [len(r["ids"]) for r in load(Path(workload) / "sft_tokens.json")]
    bins = [b for b in pack(lengths, MAX_LENGTH) if b]
    _measure(workload, bins, lengths, [0] * len(lengths), False, "tokens_per_second", sum(lengths))


def _bins_of_steps(lengths: list[int]) -> Iterator[list[int]]:
    count = len(lengths)
    for step in range(count // GLOBAL_BATCH, 2 * count // GLOBAL_BATCH):
        rows = rows_of_step(step, GLOBAL_BATCH, count, 2 * count, seed=1234)
        yield from ([rows[i] for i in b] for b in pack([lengths[r] for r in rows], MAX_LENGTH) if b)


def _measure(
    workload: str, bins: list[list[int]], lengths: list[int], targets: list[int], backward: bool, unit: str, count: int
) -> None:
    config = json.loads((Path(workload) / "model" / "config.json").read_text(encoding="utf-8"))
    work = [_products(config, [lengths[i] for i in b], sum(targets[i] for i in b), backward) for b in bins]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        for products in work:
            for left, right, out in products * config["num_hidden_layers"]:
                torch.matmul(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    report(**{unit: count / seconds[-1], "seconds": seconds[-1]})


def _products(config: dict[str, int], lengths: list[int], targets: int, backward: bool) -> list[Product]:
    hidden, ffn, heads = (config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    tokens, layers = sum(lengths), config["num_hidden_layers"]
    widths = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    found = [p for inside, outside in widths for p in _linear(tokens, inside, outside, backward)]
    # The caller repeats everything for each layer; the output layer is there once.
    found += [p for p in _linear(-(-targets // layers), hidden, config["vocab_size"], backward) if targets]
    for length in lengths:
        shape = (heads, length, hidden // heads)
        query, scores = torch.randn(shape), torch.randn(heads, length, length)
        for _ in range(3 if backward else 1):
            found += [(query, query.transpose(1, 2), scores.clone()), (scores, query, torch.empty(shape))]
    return found


def _linear(tokens: int, inside: int, outside: int, backward: bool) -> list[Product]:
    x, weight, grad = torch.randn(tokens, inside), torch.randn(outside, inside), torch.randn(tokens, outside)
    forward = [(x, weight.t(), torch.empty(tokens, outside))]
    back = [(grad, weight, torch.empty(tokens, inside)), (grad.t(), x, torch.empty(outside, inside))]
    return forward + (back if backward else [])
