"""The losses of PPO on the tokens of the policy's own answers, for the policy and its critic.

Both are sums over tokens. `train/step.py` divides them by the number of tokens of the mini-batch, so
long answers count more than short ones, as in the whitening of the advantages.
Shape legend: N targets of this rank.
"""

import torch
from torch import Tensor

from offline_align.config.sections import PolicyOptimizationMethodSection
from offline_align.data.batch import PackedBatch
from offline_align.objectives import LossSum, Objective

_MOST_LOG_RATIO = 20.0
"""Larger logarithms of a ratio count as this. Otherwise the ratio of a single token, or its gradient, could
be infinite, and the whole step would be skipped."""


def actor(settings: PolicyOptimizationMethodSection) -> Objective:
    """Return the clipped objective of the policy (Schulman et al. 2017, Eq. 7), negated.

    With the ratio `r = pi / pi_old` of a token, its advantage A and its importance weight w, the loss of a
    token is `-w min(r A, clip(r, 1 - clip, 1 + clip) A)`. The model's likelihoods must be at the temperature
    that the answers were sampled with.

    A batch without `rollout` has texts, and adds `ptx_coefficient` times their weighted negative
    log-likelihood (the last term of Eq. 3). It counts no targets, because the step is divided by those of
    the answers (see `with_texts`).

    Metrics: `ratio`; `clip_fraction`, the share of tokens without a gradient because their ratio has left
    the interval in the direction of the advantage; `approximate_kl` of the update, `r - 1 - log r` in nats per
    token. With a `ptx_coefficient` also `ptx_loss`, the mean negative log-likelihood of the texts.
    """

    def objective(nll: Tensor, batch: PackedBatch) -> LossSum:
        if batch.rollout is None:
            return _texts(nll, batch, settings.ptx_coefficient)
        known = batch.rollout
        log_ratio = (-nll - known.old_log_probs).clamp(max=_MOST_LOG_RATIO)
        ratio = log_ratio.exp()
        free = ratio * known.advantages
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip) * known.advantages
        total = -(known.importance * torch.minimum(free, clipped)).sum()
        metrics = {
            "ratio": ratio,
            "clip_fraction": clipped < free,
            # For small changes, `ratio - 1` would lose the digits that count.
            "approximate_kl": torch.expm1(log_ratio) - log_ratio,
        }
        if settings.ptx_coefficient:
            metrics["ptx_loss"] = torch.zeros_like(nll)
        return LossSum(total, nll.numel(), _sums(metrics))

    return objective


def _texts(nll: Tensor, batch: PackedBatch, coefficient: float) -> LossSum:
    assert coefficient > 0, "only answers with their columns can be learned from"
    weighted = nll * batch.target_weights
    # All micro-batches of a step have the same metrics.
    none = dict.fromkeys(("ratio", "clip_fraction", "approximate_kl"), torch.zeros_like(nll))
    return LossSum(coefficient * weighted.sum(), 0, _sums(none | {"ptx_loss": weighted}))


def critic(settings: PolicyOptimizationMethodSection) -> Objective:
    """Return the clipped squared error of the values, halved.

    The loss of a token is `max((V - R)^2, (V' - R)^2) / 2` with its return R. V' is V within
    `value_clip` of the value before the iteration, so moving further away from it earns nothing.
    `rollout` of the batch must be set.

    Metrics: `unclipped_loss`, `(V - R)^2 / 2`; `clip_fraction`, the share of tokens without a gradient;
    `value` and `return`.
    """

    def objective(values: Tensor, batch: PackedBatch) -> LossSum:
        known = batch.rollout
        assert known is not None, "only answers with their columns can be learned from"
        near = known.old_values + (values - known.old_values).clamp(-settings.value_clip, settings.value_clip)
        free, clipped = (torch.square(v - known.returns) / 2 for v in (values, near))
        metrics = {
            "unclipped_loss": free,
            "clip_fraction": clipped > free,
            "value": values,
            "return": known.returns,
        }
        return LossSum(torch.maximum(free, clipped).sum(), values.numel(), _sums(metrics))

    return objective


def _sums(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.detach().double().sum().float() for name, values in metrics.items()}
