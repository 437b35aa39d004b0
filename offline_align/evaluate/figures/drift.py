"""Distribution of normalised rewards of the labelled rows and of every policy's answers."""

from collections.abc import Mapping

import numpy as np

from offline_align.evaluate.figures.canvas import GRID, SURFACE, Picture, colour, name_rows, new_figure, style
from offline_align.evaluate.statistics import Floats

_LABELLED = 2.5
"""Half-width of the shaded band: most normalised rewards lie in it (paper)."""


def draw_drift(title: str, groups: Mapping[str, Floats]) -> Picture:
    """Return the quantiles of each group's rewards [N]: 5-95%, 25-75% and the median."""
    with style():
        figure = new_figure(5.0, 0.8 + 0.42 * len(groups))
        axes = figure.subplots()
        axes.axvspan(-_LABELLED, _LABELLED, color=GRID, alpha=0.6, linewidth=0, zorder=0)
        for k, values in enumerate(groups.values()):
            p5, p25, p50, p75, p95 = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([p5, p95], [k, k], color=colour(k), linewidth=1.5)
            axes.plot([p25, p75], [k, k], color=colour(k), linewidth=9, alpha=0.5, solid_capstyle="butt")
            axes.plot(p50, k, "o", color=SURFACE, markeredgecolor=colour(k), markeredgewidth=2, markersize=7)
        name_rows(axes, list(groups))
        return Picture(figure, title)
