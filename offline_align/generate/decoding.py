"""Sample answers of a rollout token by token, computing only the rows that have not ended.

`generate` of transformers computes every row until the longest one ends.
Shape legend: B rows of the batch, R rows that go on, W longest context.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from offline_align.generate.requests import Request
from offline_align.generate.sampling import draw

Sampled = tuple[list[int], list[float]]
"""The ids of an answer and their log-probabilities."""


@torch.inference_mode()
def sample(
    model: Any,
    requests: Sequence[Request],
    tokens: Tensor,
    mask: Tensor,
    uniform: Tensor,
    temperature: float,
    eos_ids: frozenset[int],
) -> list[Sampled]:
    """Return for each request the sampled ids, up to one of `eos_ids` or to its limit, and their log-probabilities.

    `tokens` and `mask` [B, W] are the contexts, padded on the left. `uniform` [B, longest answer] has the
    random numbers of each row.
    """
    sampled: list[Sampled] = [([], []) for _ in requests]
    cache = transformers.DynamicCache(config=model.config)
    ends = torch.tensor(sorted(eos_ids), device=tokens.device)
    rooms = torch.tensor([request.max_new_tokens for request in requests], device=tokens.device)
    rows = torch.arange(len(requests), device=tokens.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(uniform.size(1)):
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        ids, log_probs = draw(logits, uniform[rows, step], temperature)
        for row, token, log_prob in zip(rows.tolist(), ids.tolist(), log_probs.tolist(), strict=True):
            sampled[row][0].append(token)
            sampled[row][1].append(log_prob)
        goes_on = ~torch.isin(ids, ends) & (rooms[rows] > step + 1)
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            if not len(kept):
                break
            cache.batch_select_indices(kept)
            rows, mask, positions, ids = rows[kept], mask[kept], positions[kept], ids[kept]
        tokens, positions = ids[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return sampled
