"""Calibration measures against judges whose calibration is known."""

import math

import numpy as np
import pytest

from offline_align.evaluate.calibration import reliability as r
from offline_align.evaluate.statistics import Floats


def simulate(scale: float, count: int = 40_000) -> Floats:
    """Return margins towards people's choice for people who choose with sigmoid(margin / scale)."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2 * scale, size=count)
    people = np.where(rng.random(count) < 1 / (1 + np.exp(-margins / scale)), 1, -1)
    result: Floats = margins * people
    return result


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_temperature_of_a_simulated_judge_is_found(scale: float) -> None:
    found = r.reliability(simulate(scale))
    assert found["temperature"] == pytest.approx(scale, rel=0.05)
    assert found["tempered_expected_calibration_error"] < 0.01
    assert found["tempered_log_loss"] <= found["log_loss"]
    if scale != 1.0:
        assert found["expected_calibration_error"] > 0.05


def test_error_and_log_loss_of_a_small_case() -> None:
    margins = np.array([math.log(3), math.log(3), math.log(3), -math.log(3)])
    # Confidence 0.75 and right in 3 of 4 cases, in four bins of one: |0.75 - 1| three times, |0.75 - 0| once.
    assert r.expected_calibration_error(margins, 1.0) == pytest.approx((3 * 0.25 + 0.75) / 4)
    assert r.log_loss(margins, 1.0) == pytest.approx(-(3 * math.log(0.75) + math.log(0.25)) / 4)
    assert r.fit_temperature(margins) == pytest.approx(1.0, rel=1e-3)


def test_margins_that_say_nothing_have_no_finite_temperature() -> None:
    margins = np.array([1.0, -1.0] * 50)
    assert r.reliability(margins)["temperature_at_bound"]


def test_bins_hold_all_pairs_in_order_of_confidence() -> None:
    found = r.bins(np.linspace(1.0, 24.0, 24), 1.0)
    assert len(found) == r.BINS
    assert sum(b["pairs"] for b in found) == 24
    assert [b["confidence"] for b in found] == sorted(b["confidence"] for b in found)
    assert {b["accuracy"] for b in found} == {1.0}
