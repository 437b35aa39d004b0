"""Each quantity over the rounds of every series, one panel each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from offline_align.evaluate.figures.canvas import MUTED, Picture, colour, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[int, Mapping[str, float]]]
"""Round and estimate."""


def draw_rounds(title: str, panels: Mapping[str, Mapping[str, Points]]) -> Picture:
    """Return a panel for each quantity, with a line and its intervals for each series.

    `panels` has the points of each series, by the title of the panel.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = new_figure(9.6, 0.3 + 2.3 * rows)
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, lines) in zip(places, panels.items(), strict=False):
            _panel(axes, name, lines)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        if any(len(lines) > 1 for lines in panels.values()):
            _name_series(places[0])
        return Picture(figure, title)


def _panel(axes: "Axes", name: str, lines: Mapping[str, Points]) -> None:
    for k, (series, points) in enumerate(lines.items()):
        if not points:
            continue
        rounds = [number for number, _ in points]
        low, mean, high = ([one[bound] for _, one in points] for bound in ("low", "mean", "high"))
        axes.fill_between(rounds, low, high, color=colour(k + 1), alpha=0.22, linewidth=0)
        axes.plot(rounds, mean, "o-", color=colour(k + 1), linewidth=1.8, markersize=5, label=series)
    last = max(number for points in lines.values() for number, _ in points)
    axes.set_xticks(range(0, last + 1, max(1, last // 6)))
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_xlabel("round", fontsize=8)
    axes.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)


def _name_series(axes: "Axes") -> None:
    for text in axes.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
