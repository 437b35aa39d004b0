"""Lineage graph: runs as boxes, in columns by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.figures.canvas import LINE, MUTED, SURFACE, Picture, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_lineage(title: str, runs: Sequence[Ancestor]) -> Picture:
    """Return the runs as boxes in columns by depth, with arrows from their direct parents."""
    parents = _direct_parents(runs)
    place = _places(runs, parents)
    columns = 1 + max(int(x) for x, _ in place.values())
    tallest = 1 + 2 * max(abs(y) for _, y in place.values())
    with style():
        figure = new_figure(1.75 * columns, 0.75 * tallest + 0.2)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-0.45, columns - 0.55)
        axes.set_ylim(-tallest / 2, tallest / 2)
        for run in runs:
            for parent in parents[run.run_dir]:
                _arrow(axes, place[parent], place[run.run_dir])
            _box(axes, run, *place[run.run_dir])
        return Picture(figure, title)


def _direct_parents(runs: Sequence[Ancestor]) -> dict[Path, list[Path]]:
    """Return the parents of each run that are not also ancestors through another parent."""
    behind: dict[Path, set[Path]] = {}
    for run in runs:
        behind[run.run_dir] = set(run.parents).union(*(behind.get(parent, set()) for parent in run.parents))
    return {
        run.run_dir: [p for p in run.parents if not any(p in behind.get(other, ()) for other in run.parents)]
        for run in runs
    }


def _places(runs: Sequence[Ancestor], parents: dict[Path, list[Path]]) -> dict[Path, tuple[float, float]]:
    """Return column and height of each run; a column is ordered by the heights of the parents."""
    levels: dict[int, list[Ancestor]] = {}
    for run in runs:
        levels.setdefault(run.depth, []).append(run)
    place: dict[Path, tuple[float, float]] = {}

    def height(run: Ancestor) -> float:
        heights = [place[parent][1] for parent in parents[run.run_dir]]
        return -sum(heights) / len(heights) if heights else 0.0

    for x, (_, level) in enumerate(sorted(levels.items())):
        ordered = sorted(level, key=height)
        for k, run in enumerate(ordered):
            place[run.run_dir] = (float(x), (len(level) - 1) / 2 - k)
    return place


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    bend = 0.0 if end[0] - start[0] < 1.5 else 0.12 if end[1] < start[1] else -0.12
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 1, "linewidth": 1.1}
    style["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", (end[0] - 0.39, end[1]), (start[0] + 0.39, start[1]), arrowprops=style, zorder=1)


def _box(axes: "Axes", run: Ancestor, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (x - 0.36, y - 0.26),
        0.72,
        0.52,
        "round,pad=0.02,rounding_size=0.07",
        facecolor=SURFACE,
        edgecolor=LINE,
    )
    shape.set_zorder(2)
    axes.add_patch(shape)
    stage = f"{run.stage} · {run.method}" if run.method and run.method != run.stage else run.stage
    axes.text(x, y + 0.09, stage, ha="center", va="center", fontsize=9, weight="bold", zorder=3, parse_math=False)
    name = run.title if len(run.title) <= 18 else run.title[:17] + "…"
    axes.text(x, y - 0.12, name, ha="center", va="center", fontsize=8, color=MUTED, zorder=3, parse_math=False)
