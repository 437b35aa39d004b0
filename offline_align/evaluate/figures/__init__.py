"""Draw the report's figures. The page shows a picture as SVG, TensorBoard as a bitmap."""

from offline_align.evaluate.figures.calibration import draw_reliability
from offline_align.evaluate.figures.canvas import PALETTE, Picture
from offline_align.evaluate.figures.drift import draw_drift
from offline_align.evaluate.figures.following import draw_following
from offline_align.evaluate.figures.judges import draw_judges
from offline_align.evaluate.figures.lineage import draw_lineage
from offline_align.evaluate.figures.methods import draw_distributions, draw_estimates, draw_rank_scores
from offline_align.evaluate.figures.optimisation import draw_gains
from offline_align.evaluate.figures.rounds import draw_rounds
from offline_align.evaluate.figures.training import draw_curves

__all__ = [
    "PALETTE",
    "Picture",
    "draw_curves",
    "draw_distributions",
    "draw_drift",
    "draw_estimates",
    "draw_following",
    "draw_gains",
    "draw_judges",
    "draw_lineage",
    "draw_rank_scores",
    "draw_reliability",
    "draw_rounds",
]
