"""Compute log-likelihoods of answers under a policy, in packed bins on all ranks.

The result depends neither on the packing nor on the number of ranks.
Shapes: N target tokens of this rank, S rows of a bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from offline_align.config.runs import EvaluateRun
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.batch import PackedBatch
from offline_align.data.bins import SampleSource
from offline_align.data.context import share_of_context, slices_of_rank
from offline_align.data.pack import padding_multiple
from offline_align.data.records import Sample, TrainingRow
from offline_align.distributed.setup import Ranks, session, uses_bf16
from offline_align.evaluate.statistics import Floats
from offline_align.label.scoring import load_model, tokens_by_place
from offline_align.model.passes import plan_bins

if TYPE_CHECKING:
    from offline_align.model.heads import Policy


@dataclass(frozen=True, slots=True)
class Given:
    """An answer, the condition in its prompt, and whether it ends with end-of-sequence."""

    sample: Sample
    condition: str = ""
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """Log-likelihood of each answer in nats and its number of tokens; NaN and 0 if it is too long.

    Both are [answers].
    """

    nats: Floats
    tokens: Floats


def log_likelihoods(checkpoint: Path, answers: Sequence[Given], config: EvaluateRun) -> Likelihoods:
    """Return `log p(answer | prompt)` of every answer under a policy checkpoint.

    Opens a distributed session of its own; all ranks must call this together. End-of-sequence
    counts as a token of finished answers only.
    """
    policy = open_model(checkpoint, template=config.data.template, template_date=config.data.template_date)
    with session(config.parallel, config.run) as ranks:
        given = [TrainingRow(answer.sample, condition=answer.condition) for answer in answers]
        rows = tokens_by_place(given, policy.renderer(), config.data, config.run)
        source = SampleSource(rows)
        model = _load(policy, config, ranks)
        places = [int(row_id) for row_id in rows.row_ids]
        bins = plan_bins(source, config.trainer.micro_batch_size * config.data.max_length)
        own: dict[int, tuple[float, float]] = {}
        for chosen in bins[ranks.dp_rank :: ranks.dp_size]:
            finished = torch.tensor([answers[places[row]].finished for row in chosen])
            sums = _score(model, source, chosen, finished, ranks).tolist()
            own |= {places[row]: (nats, count) for row, nats, count in zip(chosen, *sums, strict=True)}
        nats, tokens = np.full(len(answers), np.nan), np.zeros(len(answers))
        for part in ranks.gather(own):
            for place, (value, count) in part.items():
                nats[place], tokens[place] = value, count
        return Likelihoods(nats, tokens)


def _load(source: ModelSource, config: EvaluateRun, ranks: Ranks) -> "Policy":
    from offline_align.model.heads import Policy

    bf16 = uses_bf16(config.trainer.precision, ranks.device)
    model = load_model(source, config.parallel, ranks, bf16)
    assert isinstance(model, Policy)
    return model


@torch.inference_mode()
def _score(model: "Policy", source: SampleSource, rows: list[int], finished: Tensor, ranks: Ranks) -> Tensor:
    """Return log-likelihood and number of tokens of the rows of one bin: [2, S] in fp64.

    `finished` is [S]. All ranks that share the bin must call this together.
    """
    multiple = padding_multiple(ranks.tp_size, ranks.cp_size, model.config.sequence_parallel)
    whole = source.collate(rows, multiple)
    batch = share_of_context(whole, ranks.cp_rank, ranks.cp_size)
    row, is_last = _targets(whole, batch, ranks)
    counted = finished[row] | ~is_last
    likelihood = -model(batch.to(ranks.device)).double().cpu()
    sums = torch.zeros(2, len(rows), dtype=torch.float64)
    sums.index_add_(1, row[counted], torch.stack((likelihood, torch.ones_like(likelihood)))[:, counted])
    return _over_context(sums, ranks)


def _targets(whole: PackedBatch, batch: PackedBatch, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return each target's row and whether it is the row's last target, both [N]."""
    bounds = slices_of_rank(whole.tokens.size(1), ranks.cp_rank, ranks.cp_size) if ranks.cp_size > 1 else []
    slices = [torch.arange(*bound) for bound in bounds] or [torch.arange(whole.tokens.size(1))]
    # The target of a position is the next token.
    target = torch.cat(slices)[batch.target_index] + 1
    row = torch.bucketize(target, whole.cu_seqlens[1:].long(), right=True)
    return row, target == whole.last_index[row]


def _over_context(sums: Tensor, ranks: Ranks) -> Tensor:
    """Return the sums over the context-parallel group."""
    if ranks.cp_size == 1:
        return sums
    from megatron.core import parallel_state

    total = sums.to(ranks.device)
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total.cpu()
