"""Rank scores of the methods by several judges (the paper's Figure 4)."""

from collections.abc import Mapping, Sequence

from offline_align.evaluate.figures.canvas import INK, Picture, colour, new_figure, style


def draw_judges(title: str, methods: Sequence[str], judges: Mapping[str, Sequence[Mapping[str, float]]]) -> Picture:
    """Return one group of bars per judge, a bar per method, with intervals.

    `judges` has the estimates (`mean`, `low`, `high`) of the methods in their order, by judge.
    """
    with style():
        figure = new_figure(1.6 + 0.42 * len(methods) * len(judges), 3.4)
        axes = figure.subplots()
        width = 0.8 / len(methods)
        for m, method in enumerate(methods):
            places = [j - 0.4 + (m + 0.5) * width for j in range(len(judges))]
            found = [estimates[m] for estimates in judges.values()]
            means = [one["mean"] for one in found]
            axes.bar(places, means, width=width * 0.9, color=colour(m), alpha=0.85, label=method)
            for x, one in zip(places, found, strict=True):
                axes.plot([x, x], [one["low"], one["high"]], color=INK, linewidth=1.2)
        axes.set_xticks(range(len(judges)))
        axes.set_xticklabels(list(judges), parse_math=False)
        axes.tick_params(length=0)
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return Picture(figure, title)
