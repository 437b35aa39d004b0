"""Reward drift for distributions with known distances."""

from pathlib import Path

import numpy as np
import pytest

from offline_align.config.sections import OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.drift import drift, drift_section, population_stability
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.sections import Section
from offline_align.lineage.manifest import describe_parent
from tests.unit.evaluate.conftest import WriteChain


def test_the_same_rewards_have_not_drifted() -> None:
    rewards = np.random.default_rng(0).normal(size=1000)
    found = drift(rewards, rewards)
    assert (found["ks"], found["psi"], found["beyond"]) == (0.0, 0.0, 0.0)
    assert found["below_low_tail"] == found["above_high_tail"] == pytest.approx(0.01)


def test_ranges_that_do_not_touch_have_distance_one() -> None:
    reference = np.linspace(0, 1, 100)
    found = drift(reference, reference + 2)
    assert (found["ks"], found["above_high_tail"], found["beyond"]) == (1.0, 1.0, 1.0)
    assert found["psi"] > 1


def test_stability_index_is_the_textbook_sum() -> None:
    # Ten equal bins of the reference; the values lie half in the first and half in the last.
    reference, values = np.linspace(0, 99, 100), np.array([0.0] * 50 + [99.0] * 50)
    terms = [2 * 0.4 * np.log(5), 8 * (0.005 - 0.1) * np.log(0.05)]
    assert population_stability(reference, values) == pytest.approx(sum(terms))


def test_equal_rewards_have_fewer_bins() -> None:
    assert population_stability(np.zeros(10), np.zeros(5)) == 0.0


def section(write_chain: WriteChain, own: bool = True) -> Section | None:
    path: Path = write_chain([8.0, 12.0, 10.0] * 20, {0.0: ["a", "b", "c"], 1.0: ["d", "e", "f"]})
    comparison = load_comparison([path], BadRows(OnBadRow.fail, None))
    scores = np.array([[[10.0, 20.0]], [[12.0, 20.0]], [[8.0, 20.0]]])
    checkpoint = path.parents[1] / "reward" / "checkpoints" / "step_1"
    content = describe_parent(checkpoint).content_sha256 if own else "another"
    return drift_section(Compared(comparison, Judgement("rm", scores, {})), content)


def test_answers_beyond_the_labels_are_reported(write_chain: WriteChain) -> None:
    found = section(write_chain)
    assert found is not None
    assert list(found.content["groups"]) == ["labelled SFT rows", "labelled pairs", "ca(0.0)", "ca(1.0)"]
    assert found.content["groups"]["labelled pairs"]["answers"] == 40
    assert found.content["groups"]["ca(1.0)"]["beyond"] == 1.0
    assert found.content["groups"]["ca(0.0)"]["beyond"] == 0.0
    assert "ca(1.0): 100% of its answers score outside the range of the labelled rows." in found.findings


def test_another_judge_says_nothing_of_drift(write_chain: WriteChain) -> None:
    assert section(write_chain, own=False) is None
