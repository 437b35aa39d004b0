"""Gain of each method against its KL divergence or its extra length."""

from collections.abc import Mapping, Sequence

from offline_align.evaluate.figures.canvas import MUTED, Picture, colour, new_figure, style


def draw_gains(
    title: str,
    methods: Sequence[str],
    points: Sequence[tuple[float, Mapping[str, float]]],
    places: Sequence[int],
    label: str,
) -> Picture:
    """Return the methods' gains with intervals on the y axis; `points` are (x, gain) pairs.

    `places` are the indices of the methods' colours, `label` names the x axis.
    """
    with style():
        figure = new_figure(5.0, 3.4)
        axes = figure.subplots()
        for method, (price, gain), k in zip(methods, points, places, strict=True):
            axes.plot([price, price], [gain["low"], gain["high"]], color=colour(k), linewidth=5, alpha=0.35)
            axes.plot(price, gain["mean"], "o", color=colour(k), markersize=8)
            axes.annotate(
                method, (price, gain["mean"]), (8, 4), textcoords="offset points", fontsize=9, parse_math=False
            )
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.margins(x=0.22, y=0.12)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("gain, standard deviations", fontsize=9)
        axes.grid(linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9)
        return Picture(figure, title)
