"""A critic is a reward model that reads every prefix; numbers of single tokens for all rows of a source."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_align.config.sections import ParallelSection, PolicyOptimizationMethodSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.rollout import RolloutColumns
from offline_align.data.rollout_source import RolloutSource
from offline_align.distributed.setup import Ranks, session
from offline_align.model.passes import target_numbers
from tests.unit.data.test_rollout_source import answer
from tests.unit.model.test_shared_prompts import MODEL, rows

CAPACITY = 40


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.fixture(scope="module")
def source() -> RolloutSource:
    draw = np.random.Generator(np.random.PCG64(4))
    sizes = [(5, 3), (20, 1), (1, 9), (12, 12), (3, 2)]
    return RolloutSource([answer(f"r{n}", *(draw.integers(0, 90, k).tolist() for k in n)) for n in sizes])


def built(kind: Any, ranks: Ranks) -> Any:
    from offline_align.model.build import build_model

    return build_model(kind, MODEL, ParallelSection(), ranks.device, bf16=False).eval()


def parts(source: RolloutSource) -> list[tuple[list[int], int]]:
    """Return the ids of each row and the length of its context."""
    tokens = source.rows
    return [
        (tokens.ids[first:last].tolist(), int(start))
        for first, last, start in zip(tokens.offsets, tokens.offsets[1:], tokens.target_start, strict=False)
    ]


def test_a_value_is_the_score_of_the_prefix_before_its_token(ranks: Ranks, source: RolloutSource) -> None:
    model = built("reward_model", ranks)
    with torch.no_grad():
        # The last token has no value after it, and its own id is in none of the prefixes.
        prefixes = [ids[:end] for ids, start in parts(source) for end in range(start, len(ids))]
        scores = model(SampleSource(rows(prefixes, [1] * len(prefixes))).collate(range(len(prefixes)), 1))
        model.reads_targets = True
        values = model(source.collate(range(len(source)), 16))
    assert values.shape == scores.shape == (27,)
    assert float(values.std()) > 0.01
    assert torch.allclose(values, scores, atol=1e-5)


def test_one_module_is_reward_model_and_critic_in_turn(ranks: Ranks, source: RolloutSource) -> None:
    model, other = built("reward_model", ranks), built("reward_model", ranks)
    batch = source.collate(range(len(source)), 1)
    other.reads_targets = True
    assert other.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        first = model(batch)
        model.reads_targets = True
        assert model(batch).shape == batch.target_ids.shape
        model.reads_targets = False
        assert torch.equal(model(batch), first)
        assert first.shape == (len(source),)


def test_gradients_of_values_are_those_of_the_scores_of_prefixes(ranks: Ranks, source: RolloutSource) -> None:
    model = built("reward_model", ranks)
    weights = torch.randn(27)
    prefixes = [ids[:end] for ids, start in parts(source) for end in range(start, len(ids))]
    scores = model(SampleSource(rows(prefixes, [1] * len(prefixes))).collate(range(len(prefixes)), 1))
    expected = torch.autograd.grad((weights * scores).sum(), list(model.parameters()))
    model.reads_targets = True
    values = model(source.collate(range(len(source)), 1))
    found = torch.autograd.grad((weights * values).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


def test_a_bin_without_rows_has_no_values(ranks: Ranks, source: RolloutSource) -> None:
    """A rank without rows still has a backward pass."""
    model = built("reward_model", ranks)
    model.reads_targets = True
    values = model(source.collate([], 4))
    assert values.numel() == 0
    values.sum().backward()


def test_numbers_of_all_targets_come_row_by_row(ranks: Ranks, source: RolloutSource) -> None:
    policy = built("policy", ranks)

    def log_probs(batch: Any) -> Tensor:
        nll: Tensor = policy(batch)
        return -nll

    found = target_numbers(log_probs, source, CAPACITY, ranks, sequence_parallel=False)
    assert [len(numbers) for numbers in found] == [3, 1, 9, 12, 2]
    with torch.no_grad():
        for row, numbers in enumerate(found):
            assert numbers.dtype == np.float32
            assert numbers == pytest.approx(log_probs(source.collate([row], 1)).numpy(), abs=1e-5)


def test_likelihoods_at_a_temperature(ranks: Ranks, source: RolloutSource) -> None:
    policy = built("policy", ranks)
    batch = source.collate(range(len(source)), 1)
    logits = policy.logits(batch)[batch.target_index, : MODEL.vocab_size] / 0.7
    expected = -logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    policy.temperature = 0.7
    found = policy(batch)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn(27)
    ours, theirs = (
        torch.autograd.grad((weights * values).sum(), list(policy.parameters())) for values in (found, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


def test_the_ratio_of_the_first_mini_batch_is_1(ranks: Ranks, source: RolloutSource) -> None:
    """Also if the log-probabilities from before were computed in other bins."""
    from offline_align.methods.ppo import whitened
    from offline_align.objectives.ppo import actor

    policy = built("policy", ranks)
    old = target_numbers(lambda batch: -policy(batch), source, CAPACITY, ranks, sequence_parallel=False)
    count = sum(map(len, old))
    drawn = np.random.Generator(np.random.PCG64(1)).normal(size=(3, count)).astype(np.float32)
    columns = RolloutColumns(np.concatenate(old), whitened(drawn[0]), np.ones(count, np.float32), drawn[1], drawn[2])
    again = RolloutSource([answer(str(k), ids[:n], ids[n:]) for k, (ids, n) in enumerate(parts(source))], columns)
    batch = again.collate([4, 1, 3, 0, 2], 1)
    metrics = actor(PolicyOptimizationMethodSection())(policy(batch), batch).metrics
    assert float(metrics["ratio"]) / count == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["clip_fraction"]) == 0
