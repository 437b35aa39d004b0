"""Losses of a policy on preference pairs: DPO and IPO, with the start of the run as the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_align.config.sections import PreferenceLoss, PreferenceMethodSection
from offline_align.data.batch import PackedBatch
from offline_align.objectives import LossSum, Objective
from offline_align.objectives.likelihoods import answer_lengths, answer_likelihoods


def preference(settings: PreferenceMethodSection) -> Objective:
    """Return the objective of `dpo`, summed over the pairs of a bin.

    With `h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))`, the loss of a pair is

    - sigmoid: `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)` with the label smoothing `e`
      (Rafailov et al. 2023, Eq. 7; for e > 0, their Eq. 3 of the cDPO note);
    - ipo: `(h - 1 / (2 beta))^2`, with log-likelihoods divided by the number of their tokens
      (Azar et al. 2023, Eq. 17).

    `sft_coefficient` adds the mean negative log-likelihood of a token of the chosen answer, times the
    coefficient. `reference` of the batch must be set.

    Metrics: `accuracy` (h above 0), `ties`; `reward_gap`, `reward_chosen` and `reward_rejected`
    (beta times the difference to the reference); `chosen_log_likelihood` and
    `rejected_log_likelihood` of whole answers in nats.
    """

    def objective(nll: Tensor, batch: PackedBatch) -> LossSum:
        assert batch.reference is not None
        pairs = batch.margins.numel()
        policy, lengths = (
            both[: 2 * pairs].view(pairs, 2) for both in (answer_likelihoods(nll, batch), answer_lengths(batch))
        )
        change = policy - batch.reference[: 2 * pairs].view(pairs, 2)
        loss = _loss(change, lengths, settings)
        if settings.sft_coefficient:
            loss = loss - settings.sft_coefficient * policy[:, 0] / lengths[:, 0]
        return LossSum(loss.sum().float(), pairs, _metrics(policy.detach(), change.detach(), settings.beta))

    return objective


def _loss(change: Tensor, lengths: Tensor, settings: PreferenceMethodSection) -> Tensor:
    """Return the loss of each pair [P], given the changes [P, 2] of log-likelihood since the start."""
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss is PreferenceLoss.ipo:
        chosen, rejected = (change / lengths).unbind(1)
        return torch.square(chosen - rejected - 1 / (2 * beta))
    chosen, rejected = change.unbind(1)
    logits = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _metrics(policy: Tensor, change: Tensor, beta: float) -> dict[str, Tensor]:
    gap = change[:, 0] - change[:, 1]
    sums = {
        "accuracy": gap > 0,
        "ties": gap == 0,
        "reward_gap": beta * gap,
        "reward_chosen": beta * change[:, 0],
        "reward_rejected": beta * change[:, 1],
        "chosen_log_likelihood": policy[:, 0],
        "rejected_log_likelihood": policy[:, 1],
    }
    return {name: values.double().sum().float() for name, values in sums.items()}
