"""Achieved reward against target reward of a conditional policy."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline_align.evaluate.figures.canvas import GRID, MUTED, Picture, colour, new_figure, style


def draw_following(
    title: str, targets: Sequence[Mapping[str, Any]], same_scale: bool, labelled: tuple[float, float] | None
) -> Picture:
    """Return achieved rewards by target with their intervals.

    The horizontal axis has the rewards that the targets stand for. The dashed diagonal (achieved =
    target) is drawn if both are on one scale. `labelled` is the range of rewards to shade.
    """
    asked = [one["reward"] for one in targets]
    low, mean, high = ([one["achieved"][name] for one in targets] for name in ("low", "mean", "high"))
    with style():
        figure = new_figure(5.0, 3.6)
        axes = figure.subplots()
        if labelled is not None:
            axes.axvspan(*labelled, color=GRID, alpha=0.7, linewidth=0, zorder=0)
        if same_scale:
            axes.plot([asked[0], asked[-1]], [asked[0], asked[-1]], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.fill_between(asked, low, high, color=colour(1), alpha=0.22, linewidth=0)
        axes.plot(asked, mean, "o-", color=colour(1), linewidth=1.8, markersize=6)
        axes.set_xlabel("target reward", fontsize=9)
        axes.set_ylabel("normalised reward achieved" if same_scale else "judge's score", fontsize=9)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9)
        return Picture(figure, title)
