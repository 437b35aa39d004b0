"""Answers of the policy to prompts, and what is known of each of their tokens.

Shape legend: C tokens of a context, n tokens of an answer, N tokens of all answers together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SampledAnswer:
    """An answer as the generation engine returned it."""

    row_id: str
    context: Ids
    """[C] ids of the prompt, as the policy was given them."""
    response: Ids
    """[n] sampled ids, with the id that ended the answer if it ended by itself; n is at least 1."""
    engine_log_probs: Numbers
    """[n] log-probability of each sampled id in nats, by the engine at the sampling temperature."""
    truncated: bool
    """Whether the answer was cut at its maximum length. Then no end of sequence is added to it."""

    def measured(
        self,
        reward_raw: float,
        reward: float,
        *,
        log_probs: Numbers,
        reference_log_probs: Numbers,
        values: Numbers,
    ) -> "Rollout":
        """Return the answer with its score and what the models say of its tokens; see `Rollout`."""
        return Rollout(
            **vars(self),
            reward_raw=reward_raw,
            reward=reward,
            log_probs=log_probs,
            reference_log_probs=reference_log_probs,
            values=values,
        )


@dataclass(frozen=True)
class Rollout(SampledAnswer):
    """An answer with everything that PPO learns from."""

    reward_raw: float
    """Score of the answer, in the reward model's own unit."""
    reward: float
    """Normalised score."""
    log_probs: Numbers
    """[n] log-probabilities in nats under the policy that answered, computed by the trainer at the
    sampling temperature."""
    reference_log_probs: Numbers
    """[n] the same under the SFT policy."""
    values: Numbers
    """[n] the critic's value before each token is known, in normalised reward."""


@dataclass(frozen=True)
class RolloutColumns:
    """What is learned from the tokens of all answers of an iteration: [N] each, answer after answer."""

    old_log_probs: Numbers
    """Log-probabilities in nats, by the trainer, under the policy that answered."""
    advantages: Numbers
    """Whitened advantages."""
    importance: Numbers
    """Weights of the policy's loss, which correct for the numerics of the generation engine."""
    old_values: Numbers
    """The critic's values before the iteration, in normalised reward."""
    returns: Numbers
    """What the critic learns to predict, in normalised reward."""


def bounds(answers: Sequence[SampledAnswer]) -> npt.NDArray[np.int64]:
    """Return where the tokens of each answer start among those of all answers, and their number: [answers + 1]."""
    return np.cumsum([0, *(len(answer.response) for answer in answers)]).astype(np.int64)
