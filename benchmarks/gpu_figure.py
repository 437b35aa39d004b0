"""Draw the results of one GPU: tokens per second and MFU of every contender."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_table import CHECK, TASKS, Line

_OURS, _PEERS = "#1f6f8b", "#b9b9b9"


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw one panel per task and kind of rows. Draws nothing if no contender has been measured yet."""
    panels: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["task"] != CHECK and "values" in line:
            panels.setdefault((line["task"], line["rows"]), []).append(line)
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(found) for found in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(9, 0.3 * sum(heights) + 0.5 * len(panels)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        constrained_layout=True,
    )
    for axis, ((task, rows), found) in zip(axes[:, 0], panels.items(), strict=True):
        # Bars are drawn from the bottom, so the fastest comes last.
        found = sorted(found, key=lambda line: float(line["values"]["tokens_per_second"]))
        rates = [line["values"]["tokens_per_second"] for line in found]
        colours = [_OURS if line["backend"] else _PEERS for line in found]
        bars = axis.barh([line["contender"] for line in found], rates, color=colours)
        axis.bar_label(bars, [_label(line) for line in found], padding=4, fontsize=8)
        axis.set_ylim(-0.5, len(found) - 0.5)
        axis.set_title(f"{TASKS[task]}, {rows} rows", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # Leave space for the label of the longest bar.
    axes[-1, 0].set_xlim(0, 1.25 * axes[-1, 0].get_xlim()[1])
    axes[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    axes[-1, 0].set_xlabel("tokens a second", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(line: Line) -> str:
    values = line["values"]
    share = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return f"{values['tokens_per_second']:,.0f}{share}"
