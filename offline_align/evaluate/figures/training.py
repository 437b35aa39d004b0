"""Training curves, one panel each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from offline_align.evaluate.ancestry import Curve
from offline_align.evaluate.figures.canvas import MUTED, Picture, colour, new_figure, style
from offline_align.evaluate.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(title: str, curves: Sequence[Curve]) -> Picture:
    """Return each curve in its own panel; dots are validation."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with style():
        figure = new_figure(9.6, 0.3 + 2.1 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, curve in zip(panels, curves, strict=False):
            _curve(axes, curve)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        return Picture(figure, title)


def _curve(axes: "Axes", curve: Curve) -> None:
    steps, values = zip(*curve.training, strict=True)
    axes.plot(steps, values, color=colour(0), linewidth=1, alpha=0.35)
    axes.plot(steps, _smooth(values), color=colour(0), linewidth=1.8)
    if curve.validation:
        axes.plot(*zip(*curve.validation, strict=True), "o", color=colour(1), markersize=5)
    axes.set_title(curve.name, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("step", fontsize=8)


def _smooth(values: Sequence[float]) -> Floats:
    """Return the moving average over a twentieth of the curve, truncated at the ends."""
    width = max(1, len(values) // 20)
    window = np.ones(width)
    sums = np.convolve(values, window, mode="same")
    result: Floats = sums / np.convolve(np.ones(len(values)), window, mode="same")
    return result
