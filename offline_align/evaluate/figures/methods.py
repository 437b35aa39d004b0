"""Scores of the methods: means, distributions over prompts, rank scores (paper's Figure 4)."""

from collections.abc import Sequence

import numpy as np

from offline_align.evaluate.figures.canvas import INK, MUTED, SURFACE, Picture, colour, name_rows, new_figure, style
from offline_align.evaluate.statistics import Floats


def draw_estimates(
    title: str, methods: Sequence[str], estimates: Sequence[dict[str, float]], reference: float | None
) -> Picture:
    """Return means with their intervals, one row per method, and `reference` as a dashed line."""
    with style():
        figure = new_figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k, estimate in enumerate(estimates):
            axes.plot([estimate["low"], estimate["high"]], [k, k], color=colour(k), linewidth=5, alpha=0.35)
            axes.plot(estimate["mean"], k, "o", color=colour(k), markersize=8)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        name_rows(axes, methods)
        return Picture(figure, title)


def draw_distributions(title: str, methods: Sequence[str], scores: Floats) -> Picture:
    """Return the quantiles of scores [prompts, methods]: 5-95%, 25-75% and the median."""
    with style():
        figure = new_figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k in range(len(methods)):
            p5, p25, p50, p75, p95 = np.quantile(scores[:, k], [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([p5, p95], [k, k], color=colour(k), linewidth=1.5)
            axes.plot([p25, p75], [k, k], color=colour(k), linewidth=9, alpha=0.5, solid_capstyle="butt")
            axes.plot(p50, k, "o", color=SURFACE, markeredgecolor=colour(k), markeredgewidth=2, markersize=7)
        name_rows(axes, methods)
        return Picture(figure, title)


def draw_rank_scores(title: str, methods: Sequence[str], means: Sequence[float]) -> Picture:
    """Return rank scores as bars (paper's Figure 4)."""
    with style():
        figure = new_figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k, mean in enumerate(means):
            axes.barh(k, mean, height=0.62, color=colour(k), alpha=0.85)
            axes.text(mean + 0.02 * len(methods), k, f"{mean:.2f}", va="center", fontsize=9, color=INK)
        axes.set_xlim(0, len(methods) * 1.12)
        name_rows(axes, methods)
        return Picture(figure, title)
