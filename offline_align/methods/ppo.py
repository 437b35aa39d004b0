"""Proximal Policy Optimization: from the scored answers of an iteration to what each token teaches.

Every rank has all answers, so these are pure functions with the same result on all of them.
Shape legend: A answers, L tokens of the longest, n tokens of one, N tokens of all together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from offline_align.config.sections import PolicyOptimizationMethodSection
from offline_align.data.rollout import Numbers, Rollout, RolloutColumns, SampledAnswer

Exact = npt.NDArray[np.float64]
_LEAST_VARIANCE = 1e-8
"""Added to the variance of the advantages, so that rounding of equal ones is not scaled up."""


def columns(rollouts: Sequence[Rollout], settings: PolicyOptimizationMethodSection) -> RolloutColumns:
    """Return what the policy and the critic learn from all answers of an iteration."""
    rewards = [token_rewards(rollout, settings) for rollout in rollouts]
    values = [rollout.values for rollout in rollouts]
    raw = _joined(advantages(rewards, values, settings.gamma, settings.gae_lambda))
    old_values = _joined(values)
    return RolloutColumns(
        old_log_probs=_joined([rollout.log_probs for rollout in rollouts]),
        advantages=whitened(raw),
        importance=_joined([importance(rollout, settings.importance_cap) for rollout in rollouts]),
        old_values=old_values,
        # The critic learns from the advantages before whitening, which are in its unit.
        returns=raw + old_values,
    )


def token_rewards(rollout: Rollout, settings: PolicyOptimizationMethodSection) -> Numbers:
    """Return the reward of each token [n] (Eq. 3): the KL penalty, and at the last token the clipped score.

    The penalty is `kl_coefficient` times the k1 estimate `log pi - log pi_SFT` of the sampled token,
    whose expectation is the KL divergence. A truncated answer gets `truncation_penalty` on top of its
    score. Its last token is not an end of sequence.
    """
    difference = rollout.log_probs - rollout.reference_log_probs
    found = (-settings.kl_coefficient * difference).astype(np.float32)
    found[-1] += np.float32(clipped_reward(rollout.reward, settings))
    if rollout.truncated:
        found[-1] += np.float32(settings.truncation_penalty)
    return found


def clipped_reward(reward: float, settings: PolicyOptimizationMethodSection) -> float:
    """Return a normalised reward within plus or minus `reward_clip`."""
    return min(max(reward, -settings.reward_clip), settings.reward_clip)


def advantages(rewards: Sequence[Numbers], values: Sequence[Numbers], gamma: float, gae_lambda: float) -> list[Numbers]:
    """Return the generalised advantage estimates [n] of each answer (Schulman et al. 2016, Eq. 16).

    `A_t = d_t + gamma lambda A_{t+1}` with `d_t = r_t + gamma V_{t+1} - V_t`, in fp32. `values` are those
    before each token; after the last token there is no value, also if the answer was truncated.
    """
    lengths = [len(reward) for reward in rewards]
    # Aligned at their ends, so that all answers go through the recursion together.
    reward, value = _right_aligned(rewards), _right_aligned(values)
    found, following, after = np.zeros_like(reward), np.zeros(len(reward), np.float32), np.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        error = reward[:, t] + np.float32(gamma) * after - value[:, t]
        following = error + np.float32(gamma * gae_lambda) * following
        found[:, t], after = following, value[:, t]
    return [row[row.size - length :] for row, length in zip(found, lengths, strict=True)]


def _right_aligned(parts: Sequence[Numbers]) -> Numbers:
    """Return the parts as the rows [A, L] of one array, with zeros before the shorter ones."""
    longest = max(map(len, parts))
    return np.stack([np.concatenate((np.zeros(longest - len(part), np.float32), part)) for part in parts])


def whitened(raw: Numbers) -> Numbers:
    """Return `raw` [N] shifted and scaled to mean 0 and variance 1 over the tokens of all answers.

    This is done once for an iteration. If it were done for each mini-batch, the sign of a token's
    advantage would depend on the others that it is drawn with.
    """
    exact = raw.astype(np.float64)
    found: Exact = (exact - exact.mean()) / np.sqrt(exact.var() + _LEAST_VARIANCE)
    return found.astype(np.float32)


def importance(answer: Rollout, cap: float) -> Numbers:
    """Return the weight of each token [n]: trainer's over engine's probability of it, and at most `cap`.

    Truncated importance sampling (Ionides 2008): answers come from the engine's numerics, but the
    gradient is that of the trainer's.
    """
    weight: Exact = np.exp(np.minimum(_log_weight(answer), np.log(cap)))
    return weight.astype(np.float32)


def _log_weight(answer: Rollout) -> Exact:
    return answer.log_probs.astype(np.float64) - answer.engine_log_probs


def metrics(
    rollouts: Sequence[Rollout], learned: RolloutColumns, settings: PolicyOptimizationMethodSection
) -> dict[str, float]:
    """Return what describes the answers of an iteration; `learned` are their `columns`.

    - `reward_raw`, `reward` (normalised), `reward_std`: mean and spread of the scores, without penalties.
    - `kl`: mean over the answers of the k1 estimate of the KL divergence from the SFT policy, in nats an
      answer. `kl_k3` estimates the same with less variance and never below 0 (Schulman 2020).
    - `entropy`: mean of `-log pi` of the sampled tokens, in nats a token.
    - `response_tokens`: mean length. `truncated_share`: share of the answers that were cut.
    - `engine_mismatch`, `engine_mismatch_max`: absolute differences between the log-probabilities of the
      trainer and the engine in nats, mean and largest. `importance_capped`: share of the tokens whose
      weight is the cap.
    - `explained_variance`: share of the variance of the returns that the critic predicted. It is missing
      if all returns are equal.
    """
    log_probs = _joined([r.log_probs for r in rollouts]).astype(np.float64)
    reference = _joined([r.reference_log_probs for r in rollouts]).astype(np.float64)
    log_weight = np.concatenate([_log_weight(r) for r in rollouts])
    rewards = np.array([r.reward for r in rollouts])
    change = reference - log_probs
    found = {
        "reward_raw": np.mean([r.reward_raw for r in rollouts]),
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "kl": -change.sum() / len(rollouts),
        "kl_k3": (np.expm1(change) - change).sum() / len(rollouts),
        "entropy": -log_probs.mean(),
        "response_tokens": log_probs.size / len(rollouts),
        "truncated_share": np.mean([r.truncated for r in rollouts]),
        "engine_mismatch": np.abs(log_weight).mean(),
        "engine_mismatch_max": np.abs(log_weight).max(),
        "importance_capped": (log_weight > np.log(settings.importance_cap)).mean(),
    }
    found |= explained_variance(learned)
    return {name: float(value) for name, value in found.items()}


def explained_variance(learned: RolloutColumns) -> dict[str, float]:
    """Return `1 - var(return - value) / var(return)` over all tokens, or nothing if all returns are equal."""
    returns, values = learned.returns.astype(np.float64), learned.old_values.astype(np.float64)
    variance = returns.var()
    return {"explained_variance": float(1 - (returns - values).var() / variance)} if variance > 0 else {}


def kl_of_answers(rollouts: Sequence[Rollout]) -> Exact:
    """Return the k1 estimate of the KL divergence from the SFT policy of each answer [A], in nats."""
    return np.array([(r.log_probs.astype(np.float64) - r.reference_log_probs).sum() for r in rollouts])


def collapse(rollouts: Sequence[Rollout], settings: PolicyOptimizationMethodSection) -> str | None:
    """Return, as one line, why the answers of an iteration cannot be learned from; None if they can."""
    for name in ("engine_log_probs", "log_probs", "reference_log_probs", "values"):
        bad = [r.row_id for r in rollouts if not np.isfinite(getattr(r, name)).all()]
        if bad:
            return f"{len(bad)} of {len(rollouts)} answers have {name} that are not finite, such as that to {bad[0]}"
    bad = [r.row_id for r in rollouts if not np.isfinite(r.reward)]
    if bad:
        return f"{len(bad)} of {len(rollouts)} answers have a reward that is not finite, such as that to {bad[0]}"
    kl = float(kl_of_answers(rollouts).mean())
    if settings.max_kl is not None and kl > settings.max_kl:
        return (
            f"the KL divergence from the SFT policy is {kl:.4g} nats an answer, above method.max_kl={settings.max_kl:g}"
        )
    if _all_equal(rollouts):
        return f"all {len(rollouts)} answers are the same"
    return None


def _all_equal(answers: Sequence[SampledAnswer]) -> bool:
    different = {answer.response.tobytes() for answer in answers}
    return len(different) == 1 and len({answer.context.tobytes() for answer in answers}) > 1


def _joined(parts: Sequence[Numbers]) -> Numbers:
    return np.concatenate(parts).astype(np.float32)
