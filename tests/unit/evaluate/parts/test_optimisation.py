"""The checks against over-optimisation, for gains from length, from one model's weakness, and real gains."""

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.divergence import Divergence
from offline_align.evaluate.parts.optimisation import (
    at_equal_length,
    optimisation_section,
    reversals,
    standardised_gains,
    wrong_order,
)
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.sections import Section
from offline_align.evaluate.statistics import Floats
from tests.unit.evaluate.conftest import WriteRun

PROMPTS = 40
SETTINGS = EvaluateSection(bootstrap_samples=200)


def section(
    write_run: WriteRun,
    scores: Floats,
    second: Floats | None = None,
    divergence: Divergence | None = None,
    spread: int = 5,
    truth: Floats | None = None,
) -> Section | None:
    """Return the section for answers of one word by sft, of 2 to 1 + `spread` words by fa."""
    files = []
    for name, words in (("sft", lambda k: 1), ("fa", lambda k: 2 + k % spread)):
        rows = [{"id": str(k), "prompt": f"p{k}", "response": "x " * words(k)} for k in range(PROMPTS)]
        files.append(write_run(name, rows, name))
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    judgement = Judgement("rm", scores[:, None, :], {})
    others = None if second is None else second[:, None, :]
    quality = None if truth is None else truth[:, None, :]
    return optimisation_section(Compared(comparison, judgement, quality), SETTINGS, 0, others, "runs/other", divergence)


def noise(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(PROMPTS, 2))


def test_a_gain_that_the_second_model_shares_is_real(write_run: WriteRun) -> None:
    gain = np.array([0.0, 3.0])
    found = section(write_run, noise(0) + gain, noise(1) + gain)
    assert found is not None
    assert found.content["methods"]["fa"]["second_gain"]["low"] > 1
    assert found.findings == ["No gain is due to length alone or to one reward model alone, as far as measured here."]


def test_a_blind_spot_of_the_judge_is_found(write_run: WriteRun) -> None:
    found = section(write_run, noise(0) + np.array([0.0, 3.0]), noise(1))
    assert found is not None
    assert found.findings == ["fa gains by the judge, but not significantly by the second reward model."]
    assert found.tables[0].header[-2:] == ["second model", "words"]


def test_without_a_second_model_length_alone_is_looked_at(write_run: WriteRun) -> None:
    found = section(write_run, noise(0) + np.array([0.0, 3.0]))
    assert found is not None
    assert "second_gain" not in found.content["methods"]["fa"]
    assert found.findings == ["No gain is due to length alone, as far as measured here."]


def test_a_gain_that_true_quality_shares_is_real(write_run: WriteRun) -> None:
    gain = np.array([0.0, 3.0])
    found = section(write_run, noise(0) + gain, truth=noise(1) + gain)
    assert found is not None
    assert found.content["methods"]["fa"]["true_gain"]["low"] > 1
    assert found.findings == [
        "No gain is due to length alone or to an error of the reward model, as far as measured here."
    ]
    assert found.tables[0].header[-2:] == ["words", "true quality"]


@pytest.mark.parametrize(("true_gain", "lines"), [(0.0, 1), (-3.0, 2)])
def test_a_reward_that_truth_does_not_follow_is_found(write_run: WriteRun, true_gain: float, lines: int) -> None:
    """The reward model is gamed: the score rises by three deviations, true quality stays or falls."""
    found = section(write_run, noise(0) + np.array([0.0, 3.0]), truth=noise(1) + np.array([0.0, true_gain]))
    assert found is not None
    assert len(found.findings) == lines
    assert found.findings[0].startswith("fa gains by the judge, but not significantly in true quality: ")
    worse = "fa has a higher score than sft but a lower true quality."
    assert found.findings[1:] == [worse] * (lines - 1)


def test_an_order_that_truth_reverses_is_found() -> None:
    """Both methods gain over the baseline, but the judge prefers the worse of the two."""
    scores = np.random.default_rng(0).normal(size=(PROMPTS, 3)) + np.array([0.0, 2.0, 4.0])
    truth = np.random.default_rng(1).normal(size=(PROMPTS, 3)) + np.array([0.0, 4.0, 2.0])
    names = ["sft", "fa", "ca"]
    assert reversals(scores, truth, names, SETTINGS, 0) == [("ca", "fa")]
    assert reversals(scores[:, ::-1], truth[:, ::-1], names[::-1], SETTINGS, 0) == [("ca", "fa")]
    assert reversals(scores, scores, names, SETTINGS, 0) == []


@pytest.mark.parametrize("second", [None, noise(1) + np.array([0.0, 3.0])])
def test_where_lengths_differ_by_a_constant_nothing_is_said_of_equal_length(
    write_run: WriteRun, second: Floats | None
) -> None:
    found = section(write_run, noise(0) + np.array([0.0, 3.0]), second, spread=1)
    assert found is not None
    assert found.content["methods"]["fa"]["at_equal_length"] is None
    assert found.tables[0].rows[0][found.tables[0].header.index("at equal length")] == "unknown"
    *others, last = found.findings
    assert "gain at equal length is unknown" in last
    shared = "No gain is due to one reward model alone, as far as measured here."
    assert others == ([] if second is None else [shared])


def distance(nats: Floats, sampled: bool) -> Divergence:
    """Return log-ratios [prompts, methods] of answers of ten tokens."""
    return Divergence(nats[:, None, :], np.where(np.isfinite(nats), 10.0, 0.0)[:, None, :], (True, sampled))


def test_the_distance_stands_beside_the_gain(write_run: WriteRun) -> None:
    nats = np.column_stack([np.zeros(PROMPTS), np.linspace(10, 30, PROMPTS)])
    nats[:5, 1] = np.nan
    found = section(write_run, noise(0) + np.array([0.0, 3.0]), divergence=distance(nats, sampled=True))
    assert found is not None
    fa = found.content["methods"]["fa"]
    assert fa["kl"]["mean"] == pytest.approx(nats[5:, 1].mean())
    assert fa["kl_per_token"] == pytest.approx(nats[5:, 1].mean() / 10)
    assert (fa["kl_prompts"], fa["kl_is_unbiased"]) == (PROMPTS - 5, True)
    assert fa["kl"]["low"] < fa["kl"]["mean"] < fa["kl"]["high"]
    assert found.findings[-1].startswith("fa diverges most from sft: KL +21.28")
    assert found.tables[0].header[-2:] == ["KL", "KL per token"]
    assert [drawing.picture.title for drawing in found.drawings] == ["Gain by kl", "Gain by words"]


def test_a_log_ratio_of_greedy_answers_is_said_to_be_one(write_run: WriteRun) -> None:
    found = section(write_run, noise(0), divergence=distance(np.ones((PROMPTS, 2)), sampled=False))
    assert found is not None
    assert "mean log-ratio of the answers" in found.findings[-1]


def test_an_unknown_distance_is_not_zero(write_run: WriteRun) -> None:
    nats = np.full((PROMPTS, 2), np.nan)
    found = section(write_run, noise(0), divergence=distance(nats, sampled=True))
    assert found is not None
    assert "kl" not in found.content["methods"]["fa"]
    assert "KL" not in found.tables[0].header


def test_gains_are_in_deviations_of_the_baseline() -> None:
    scores = np.array([[0.0, 4.0], [2.0, 6.0]])
    assert standardised_gains(scores, 0)[:, 1] == pytest.approx([4.0, 4.0])
    assert standardised_gains(np.array([[1.0, 3.0], [1.0, 5.0]]), 0)[:, 1] == pytest.approx([2.0, 4.0])


def test_what_length_explains_is_taken_off() -> None:
    words = np.column_stack([np.full(50, 10.0), 10.0 + np.arange(50)])
    made_of_length = np.column_stack([np.zeros(50), 0.2 * np.arange(50)])
    assert at_equal_length(made_of_length, words, 0) == pytest.approx(np.zeros((50, 2)))
    constant = np.column_stack([np.zeros(50), np.ones(50)])
    assert at_equal_length(constant, words, 0) == pytest.approx(constant)


def test_a_slope_that_cannot_be_seen_is_not_taken_for_none() -> None:
    gains = np.column_stack([np.zeros(3), np.arange(3.0)])
    assert at_equal_length(gains, np.array([[1 / 3, 0.7]] * 3), 0) is None
    assert at_equal_length(gains[:1], np.array([[1.0, 5.0]]), 0) is None
    assert at_equal_length(gains, np.full((3, 2), 1 / 3), 0) == pytest.approx(gains), "all are of equal length"


def test_policies_of_several_seeds_are_one_method_in_the_wrong_order() -> None:
    pools = {"sft": ["sft"], "ca": ["ca"], "fa": ["fa seed 1", "fa seed 2"], "dpo": ["dpo seed 1", "dpo seed 2"]}
    pairs = [("ca", "sft"), ("dpo seed 1", "fa seed 1"), ("dpo seed 1", "fa seed 2"), ("dpo seed 1", "dpo seed 2")]
    assert wrong_order(pairs, pools) == [
        "ca has a higher score than sft but a lower true quality.",
        "dpo has a higher score than fa but a lower true quality, in 2 of 4 pairs of seeds.",
    ]
