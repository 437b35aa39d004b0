"""Rewards, advantages and weights of PPO's tokens, by hand and against definitions written out in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest

from offline_align.config.sections import PolicyOptimizationMethodSection
from offline_align.data.rollout import Numbers, Rollout, SampledAnswer
from offline_align.methods import ppo

SETTINGS = PolicyOptimizationMethodSection()


def numbers(*values: float) -> Numbers:
    return np.array(values, dtype=np.float32)


def rollout(
    log_probs: Numbers,
    reference: Numbers | None = None,
    values: Numbers | None = None,
    *,
    engine: Numbers | None = None,
    reward: float = 0.0,
    truncated: bool = False,
    name: str = "a",
    response: list[int] | None = None,
) -> Rollout:
    ids = np.array(response or range(len(log_probs)), dtype=np.int32)
    context = np.array([len(name), ord(name[-1])], dtype=np.int32)
    answer = SampledAnswer(name, context, ids, log_probs if engine is None else engine, truncated)
    return answer.measured(
        10 * reward + 1,
        reward,
        log_probs=log_probs,
        reference_log_probs=log_probs if reference is None else reference,
        values=np.zeros_like(log_probs) if values is None else values,
    )


def random_rollouts(lengths: list[int]) -> list[Rollout]:
    draw = np.random.Generator(np.random.PCG64(3))
    found = []
    for k, length in enumerate(lengths):
        log_probs, reference, values, engine = (draw.normal(-1, 0.5, length).astype(np.float32) for _ in range(4))
        name = f"row {chr(97 + k)}"
        found.append(
            rollout(log_probs, reference, values, engine=engine, reward=draw.normal(), truncated=k == 1, name=name)
        )
    return found


def test_rewards_of_tokens_are_equation_3() -> None:
    row = rollout(numbers(-1.0, -2.0, -0.5), numbers(-1.5, -1.0, -0.5), reward=1.5)
    settings = replace(SETTINGS, kl_coefficient=0.1)
    # The policy likes the first token more than the SFT policy does, and the second one less.
    assert ppo.token_rewards(row, settings) == pytest.approx([-0.05, 0.1, 1.5])


@pytest.mark.parametrize(("reward", "clipped"), [(12.0, 10.0), (-30.0, -10.0), (3.0, 3.0)])
def test_the_score_is_clipped(reward: float, clipped: float) -> None:
    found = ppo.token_rewards(rollout(numbers(-1.0, -1.0), reward=reward), SETTINGS)
    assert found.tolist() == [0.0, clipped]


def test_the_score_is_clipped_but_not_the_penalties() -> None:
    row = rollout(numbers(-1.0), numbers(-101.0), reward=99.0, truncated=True)
    assert ppo.token_rewards(row, SETTINGS) == pytest.approx([10.0 - 1.0 - 1.0])


def test_a_truncated_answer_is_penalised_at_its_last_token_and_not_continued() -> None:
    ended, cut = (rollout(numbers(-1.0, -1.0, -2.0), reward=2.0, truncated=cut) for cut in (False, True))
    assert ppo.token_rewards(ended, SETTINGS).tolist() == [0, 0, 2]
    assert ppo.token_rewards(cut, SETTINGS).tolist() == [0, 0, 1]
    assert ppo.token_rewards(cut, replace(SETTINGS, truncation_penalty=-0.25)).tolist() == [0, 0, 1.75]
    learned = ppo.columns([cut, ended], replace(SETTINGS, gae_lambda=1.0))
    assert learned.returns.tolist() == [1, 1, 1, 2, 2, 2]


def test_advantages_by_hand() -> None:
    (found,) = ppo.advantages([numbers(0.0, 1.0)], [numbers(0.5, 0.25)], gamma=0.5, gae_lambda=0.5)
    # d_1 = 1 - 0.25, d_0 = 0.5 * 0.25 - 0.5, A_0 = d_0 + 0.25 d_1
    assert found.tolist() == [-0.1875, 0.75]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0)])
def test_advantages_are_the_sum_of_their_definition(gamma: float, gae_lambda: float) -> None:
    draw = np.random.Generator(np.random.PCG64(1))
    lengths = [7, 1, 40, 13]
    rewards, values = ([draw.normal(size=n).astype(np.float32) for n in lengths] for _ in range(2))
    found = ppo.advantages(rewards, values, gamma, gae_lambda)
    for reward, value, advantage in zip(rewards, values, found, strict=True):
        r, v = reward.astype(np.float64), np.append(value.astype(np.float64), 0.0)
        n = len(r)
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * gae_lambda) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]
        assert advantage.dtype == np.float32
        assert advantage == pytest.approx(expected, abs=1e-5)


def test_without_decay_an_advantage_is_what_the_return_has_over_the_value() -> None:
    rewards, values = numbers(0.1, -0.2, 3.0), numbers(0.5, 0.25, 2.0)
    (found,) = ppo.advantages([rewards], [values], gamma=1.0, gae_lambda=1.0)
    assert found == pytest.approx(np.cumsum(rewards[::-1])[::-1] - values, abs=1e-6)


def test_the_answers_of_an_iteration_do_not_change_each_other_before_whitening() -> None:
    rows = random_rollouts([3, 9, 1, 5])
    together = ppo.columns(rows, SETTINGS)
    alone = [ppo.columns([row], SETTINGS) for row in rows]
    for name in ("old_log_probs", "importance", "old_values", "returns"):
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(one, name) for one in alone])), name


def test_advantages_are_whitened_over_all_tokens() -> None:
    rows = random_rollouts([3, 9, 1, 5])
    learned = ppo.columns(rows, SETTINGS)
    raw = learned.returns.astype(np.float64) - learned.old_values
    assert len(learned.advantages) == 18
    assert learned.advantages.mean() == pytest.approx(0.0, abs=1e-6)
    assert learned.advantages.std() == pytest.approx(1.0, abs=1e-6)
    # Whitening shifts and scales only, so the order and the distances stay.
    assert np.corrcoef(raw, learned.advantages)[0, 1] == pytest.approx(1.0, abs=1e-9)
    # The parts are not whitened for themselves.
    assert abs(learned.advantages[:3].mean()) > 0.01


def test_equal_advantages_whiten_to_zero() -> None:
    """Also if rounding tells them apart: the spread of 1e-7 is not scaled up to 1."""
    assert ppo.whitened(numbers(0.3, 0.3, 0.3)).tolist() == [0, 0, 0]
    assert np.abs(ppo.whitened(numbers(0.3, 0.3 + 6e-8))).max() < 1e-3


def test_weights_correct_for_the_engine_up_to_the_cap() -> None:
    engine = numbers(-1.0, -1.0, -1.0, -2000.0)
    row = rollout(numbers(-1.0, -1.5, -0.0, -1.0), engine=engine)
    assert ppo.importance(row, 2.0) == pytest.approx([1.0, math.exp(-0.5), 2.0, 2.0])
    assert ppo.importance(row, 3.0) == pytest.approx([1.0, math.exp(-0.5), math.e, 3.0])
    assert ppo.importance(rollout(engine), 2.0).tolist() == [1, 1, 1, 1]


def test_metrics_by_hand() -> None:
    rows = [
        rollout(numbers(-1.0, -1.0), numbers(-1.5, -1.25), engine=numbers(-1.0, -2.0), reward=1.0),
        rollout(numbers(-0.5), numbers(-0.25), engine=numbers(-0.25), reward=3.0, truncated=True),
    ]
    found = ppo.metrics(rows, ppo.columns(rows, SETTINGS), SETTINGS)
    differences = (0.5, 0.25, -0.25)  # log pi - log pi_SFT
    expected = {
        "reward_raw": 21.0,
        "reward": 2.0,
        "reward_std": 1.0,
        "kl": sum(differences) / 2,
        "kl_k3": sum(math.exp(-d) - 1 + d for d in differences) / 2,
        "entropy": 2.5 / 3,
        "response_tokens": 1.5,
        "truncated_share": 0.5,
        "engine_mismatch": 1.25 / 3,
        "engine_mismatch_max": 1.0,
        "importance_capped": 1 / 3,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert found.keys() - expected.keys() == {"explained_variance"}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("values", "share"),
    [([3.0, 3.0, -1.0, -1.0], 1.0), ([0.0] * 4, 0.0), ([5.0] * 4, 0.0), ([1.0, 1.0, -1.0, -1.0], 0.75)],
)
def test_explained_variance(values: list[float], share: float) -> None:
    """A critic that knows the returns explains all, a constant one nothing, whatever its level."""
    rows = [
        rollout(numbers(-1.0, -1.0), values=numbers(*values[:2]), reward=3.0, name="a"),
        rollout(numbers(-1.0, -1.0), values=numbers(*values[2:]), reward=-1.0, name="b"),
    ]
    learned = ppo.columns(rows, replace(SETTINGS, gae_lambda=1.0))
    assert learned.returns == pytest.approx([3, 3, -1, -1])
    assert ppo.explained_variance(learned)["explained_variance"] == pytest.approx(share)


def test_equal_returns_have_no_explained_variance() -> None:
    rows = [rollout(numbers(-1.0), reward=1.0), rollout(numbers(-2.0), reward=1.0)]
    assert "explained_variance" not in ppo.metrics(rows, ppo.columns(rows, SETTINGS), SETTINGS)


def test_answers_that_can_be_learned_from_are_no_collapse() -> None:
    assert ppo.collapse(random_rollouts([3, 9, 1, 5]), replace(SETTINGS, max_kl=100.0)) is None
    # Two answers to one prompt may well be the same.
    assert ppo.collapse([rollout(numbers(-1.0)), rollout(numbers(-2.0))], SETTINGS) is None


def test_a_collapse_is_named_in_one_line() -> None:
    far = [rollout(numbers(-1.0, -1.0), numbers(-3.0, -2.0)), rollout(numbers(-1.0), numbers(-2.0), name="b")]
    assert ppo.collapse(far, replace(SETTINGS, max_kl=2.0)) is None
    line = "the KL divergence from the SFT policy is 2 nats an answer, above method.max_kl=1.5"
    assert ppo.collapse(far, replace(SETTINGS, max_kl=1.5)) == line
    same = [rollout(numbers(-1.0), name=name, response=[7]) for name in ("a", "b", "c")]
    assert ppo.collapse(same, SETTINGS) == "all 3 answers are the same"
    bad = [rollout(numbers(-1.0)), rollout(numbers(math.nan), engine=numbers(-1.0), name="b")]
    line = "1 of 2 answers have log_probs that are not finite, such as that to b"
    assert ppo.collapse(bad, SETTINGS) == line
    assert "a reward that is not finite" in str(ppo.collapse([rollout(numbers(-1.0), reward=math.inf)], SETTINGS))
