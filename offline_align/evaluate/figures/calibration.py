"""Reliability diagram: the judge's confidence against the share of pairs on which people agree."""

from collections.abc import Sequence
from typing import Any

from offline_align.evaluate.figures.canvas import MUTED, Picture, colour, new_figure, style


def draw_reliability(title: str, raw: Sequence[dict[str, Any]], tempered: Sequence[dict[str, Any]]) -> Picture:
    """Return accuracy by confidence, before and after temperature scaling, with the diagonal."""
    with style():
        figure = new_figure(5.0, 3.9)
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for k, (name, found) in enumerate((("as scored", raw), ("after temperature", tempered))):
            places = [b["confidence"] for b in found], [b["accuracy"] for b in found]
            axes.plot(*places, "o-", color=colour(k), linewidth=1.6, markersize=5, label=name)
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min(0.4, *(b["accuracy"] - 0.03 for b in (*raw, *tempered))), 1.03)
        axes.set_xlabel("confidence of the judge: sigmoid of the margin", fontsize=9)
        axes.set_ylabel("share of pairs on which people agree", fontsize=9)
        axes.grid(linewidth=0.8)
        axes.tick_params(length=0, labelsize=9)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        return Picture(figure, title)
