"""The guard against over-optimisation, on gains that are made of length, of a blind spot, or real."""

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.optimisation import at_equal_length, optimisation_section, standardised_gains
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.sections import Section
from offline_align.evaluate.statistics import Floats
from tests.unit.evaluate.conftest import WriteRun

PROMPTS = 40
SETTINGS = EvaluateSection(bootstrap_samples=200)


def section(write_run: WriteRun, scores: Floats, second: Floats | None = None) -> Section | None:
    rows = [{"id": str(k), "prompt": f"p{k}", "response": "x " * (1 + k % 5)} for k in range(PROMPTS)]
    files = [write_run(name, rows, name) for name in ("sft", "fa")]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    judgement = Judgement("rm", scores[:, None, :], {})
    others = None if second is None else second[:, None, :]
    return optimisation_section(Compared(comparison, judgement), SETTINGS, 0, others, "runs/other")


def noise(seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(PROMPTS, 2))


def test_a_gain_that_the_second_model_shares_is_real(write_run: WriteRun) -> None:
    gain = np.array([0.0, 3.0])
    found = section(write_run, noise(0) + gain, noise(1) + gain)
    assert found is not None
    assert found.content["methods"]["fa"]["second_gain"]["low"] > 1
    assert found.findings == ["No gain rests on length alone or on one reward model alone, as far as is measured here."]


def test_a_blind_spot_of_the_judge_is_found(write_run: WriteRun) -> None:
    found = section(write_run, noise(0) + np.array([0.0, 3.0]), noise(1))
    assert found is not None
    assert found.findings == ["fa gains by the judge, but not surely by the second reward model."]
    assert found.tables[0].header[-2:] == ["second model", "words"]


def test_without_a_second_model_length_alone_is_looked_at(write_run: WriteRun) -> None:
    found = section(write_run, noise(0) + np.array([0.0, 3.0]))
    assert found is not None
    assert "second_gain" not in found.content["methods"]["fa"]


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
