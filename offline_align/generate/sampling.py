"""Sample from logits with random numbers that belong to a row, whichever batch it is in.

Shape legend: B rows of the batch, V vocabulary, L longest answer in tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offline_align.generate.requests import Request


def uniforms(requests: Sequence[Request], seed: int, device: torch.device) -> Tensor:
    """Return [B, L] fp64 numbers in [0, 1); each row depends only on (seed, row, sample index)."""
    length = max(request.max_new_tokens for request in requests)
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, r.row, r.sample_index)))).random(length)
        for r in requests
    ]
    return torch.from_numpy(np.stack(rows)).to(device)


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return [B] ids sampled from logits [B, V] by inverting the cumulative distribution at `uniform` [B].

    Only the most probable tokens that together reach probability `top_p` can be drawn.
    """
    probability = torch.softmax(logits.float() / temperature, dim=-1)
    ranked, ids = probability.sort(dim=-1, descending=True, stable=True)
    cumulative = ranked.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    last = torch.searchsorted(cumulative, top_p * total).clamp(max=logits.size(-1) - 1)
    mass = cumulative.gather(1, last)
    place = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).clamp(max=last)
    return ids.gather(1, place)[:, 0]


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return [B] ids sampled from logits [B, V], and their log-probabilities [B] in fp32.

    All tokens can be drawn. So they are not sorted, and the ids are others than those of `choose` at
    the same `uniform` [B].
    """
    log_probability = torch.log_softmax(logits.float() / temperature, dim=-1)
    cumulative = log_probability.double().exp_().cumsum(dim=-1)
    # The sum may differ from 1 by rounding. It is never drawn, because every number is below 1.
    drawn = uniform[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, drawn, right=True)
    return ids[:, 0], log_probability.gather(1, ids)[:, 0]
