"""Measure a judge's calibration: confidence bins, calibration error, temperature scaling.

The reward model is trained so that sigmoid(r(a) - r(b)) is the probability that people prefer a
(Eq. 2). Shapes: N pairs on which people prefer one answer; margins [N] are positive if the judge
prefers the same answer.
"""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from offline_align.evaluate.statistics import Floats

BINS = 10
# A fit beyond a factor of 1000 means that the margins are uninformative or always right.
_LOG_TEMPERATURE = (-np.log(1e3), np.log(1e3))


def reliability(margins: Floats) -> dict[str, Any]:
    """Return confidence bins, calibration error and log loss, before and after temperature scaling.

    Raises ValueError if there are no pairs.
    """
    if not margins.size:
        raise ValueError("no pairs")
    temperature = fit_temperature(margins)
    return {
        "pairs": int(margins.size),
        "temperature": temperature,
        "temperature_at_bound": bool(abs(np.log(temperature)) > 0.99 * _LOG_TEMPERATURE[1]),
        "log_loss": log_loss(margins, 1.0),
        "tempered_log_loss": log_loss(margins, temperature),
        "expected_calibration_error": expected_calibration_error(margins, 1.0),
        "tempered_expected_calibration_error": expected_calibration_error(margins, temperature),
        "bins": bins(margins, 1.0),
        "tempered_bins": bins(margins, temperature),
    }


def fit_temperature(margins: Floats) -> float:
    """Return T that minimises the log loss of sigmoid(margin / T) on these same pairs."""
    found = minimize_scalar(lambda log_t: log_loss(margins, float(np.exp(log_t))), bounds=_LOG_TEMPERATURE)
    return float(np.exp(found.x))


def log_loss(margins: Floats, temperature: float) -> float:
    """Return the mean of -log sigmoid(margin / T) in nats; a coin flip has log 2 = 0.693."""
    return float(-log_expit(margins / temperature).mean())


def bins(margins: Floats, temperature: float) -> list[dict[str, float | int]]:
    """Return up to ten equal-sized bins by confidence sigmoid(|margin| / T), 0.5 to 1.

    A tie of the judge counts as half right.
    """
    confidence = expit(np.abs(margins) / temperature)
    right = (1 + np.sign(margins)) / 2
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(BINS, margins.size))
    return [
        {
            "pairs": len(part),
            "confidence": float(confidence[part].mean()),
            "accuracy": float(right[part].mean()),
        }
        for part in parts
    ]


def expected_calibration_error(margins: Floats, temperature: float) -> float:
    """Return the mean of |confidence - accuracy| over the bins, weighted by their pairs."""
    found = bins(margins, temperature)
    return float(sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in found) / margins.size)
