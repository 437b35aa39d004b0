"""The report's figures: each function returns an `<svg>` element for the page."""

from offline_align.evaluate.figures.calibration import draw_reliability
from offline_align.evaluate.figures.canvas import PALETTE
from offline_align.evaluate.figures.drift import draw_drift
from offline_align.evaluate.figures.following import draw_following
from offline_align.evaluate.figures.lineage import draw_lineage
from offline_align.evaluate.figures.methods import draw_distributions, draw_estimates, draw_rank_scores
from offline_align.evaluate.figures.training import draw_curves

__all__ = [
    "PALETTE",
    "draw_curves",
    "draw_distributions",
    "draw_drift",
    "draw_estimates",
    "draw_following",
    "draw_lineage",
    "draw_rank_scores",
    "draw_reliability",
]
