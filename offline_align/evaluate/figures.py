"""The report's figures as SVG whose colours are CSS variables of the page: one drawing, light and dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offline_align.evaluate.ancestry import Ancestor, Curve
from offline_align.evaluate.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib needs real colours: these stand for CSS variables and are replaced in the text.
INK, MUTED, GRID, SURFACE, LINE = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", LINE: "--line"}
PALETTE = 8
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "offline-align",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def colour(index: int) -> str:
    """Return the stand-in for the page's variable `--m<index>`; colours repeat after eight methods."""
    return f"#0102{0x10 + index % PALETTE:02x}"


def draw_estimates(
    title: str, methods: Sequence[str], estimates: Sequence[dict[str, float]], reference: float | None
) -> str:
    """Return means with their intervals, a line each, and `reference` as a dashed line."""
    with _style():
        figure = _figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k, estimate in enumerate(estimates):
            axes.plot([estimate["low"], estimate["high"]], [k, k], color=colour(k), linewidth=5, alpha=0.35)
            axes.plot(estimate["mean"], k, "o", color=colour(k), markersize=8)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        _rows(axes, methods)
        return _as_svg(figure, title)


def draw_distributions(title: str, methods: Sequence[str], scores: Floats) -> str:
    """Return the spread of scores [prompts, methods]: 5-95 % thin, 25-75 % thick, the median a dot."""
    with _style():
        figure = _figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k in range(len(methods)):
            p5, p25, p50, p75, p95 = np.quantile(scores[:, k], [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([p5, p95], [k, k], color=colour(k), linewidth=1.5)
            axes.plot([p25, p75], [k, k], color=colour(k), linewidth=9, alpha=0.5, solid_capstyle="butt")
            axes.plot(p50, k, "o", color=SURFACE, markeredgecolor=colour(k), markeredgewidth=2, markersize=7)
        _rows(axes, methods)
        return _as_svg(figure, title)


def draw_rank_scores(title: str, methods: Sequence[str], means: Sequence[float]) -> str:
    """Return rank scores as bars, the paper's Figure 4."""
    with _style():
        figure = _figure(5.0, 0.8 + 0.42 * len(methods))
        axes = figure.subplots()
        for k, mean in enumerate(means):
            axes.barh(k, mean, height=0.62, color=colour(k), alpha=0.85)
            axes.text(mean + 0.02 * len(methods), k, f"{mean:.2f}", va="center", fontsize=9, color=INK)
        axes.set_xlim(0, len(methods) * 1.12)
        _rows(axes, methods)
        return _as_svg(figure, title)


def draw_curves(title: str, curves: Sequence[Curve]) -> str:
    """Return the training loss of each run in a panel of its own; dots are validation."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with _style():
        figure = _figure(9.6, 0.3 + 2.1 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, curve in zip(panels, curves, strict=False):
            _curve(axes, curve)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        return _as_svg(figure, title)


def draw_lineage(title: str, runs: Sequence[Ancestor]) -> str:
    """Return the runs as boxes in columns by depth, an arrow from each parent that no other one implies."""
    parents = _direct_parents(runs)
    place = _places(runs, parents)
    columns = 1 + max(int(x) for x, _ in place.values())
    tallest = 1 + 2 * max(abs(y) for _, y in place.values())
    with _style():
        figure = _figure(1.75 * columns, 0.75 * tallest + 0.2)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(-0.45, columns - 0.55)
        axes.set_ylim(-tallest / 2, tallest / 2)
        for run in runs:
            for parent in parents[run.run_dir]:
                _arrow(axes, place[parent], place[run.run_dir])
            _box(axes, run, *place[run.run_dir])
        return _as_svg(figure, title)


def _direct_parents(runs: Sequence[Ancestor]) -> dict[Path, list[Path]]:
    """Return the parents of each run without those that it also has through another parent."""
    behind: dict[Path, set[Path]] = {}
    for run in runs:
        behind[run.run_dir] = set(run.parents).union(*(behind.get(parent, set()) for parent in run.parents))
    return {
        run.run_dir: [p for p in run.parents if not any(p in behind.get(other, ()) for other in run.parents)]
        for run in runs
    }


def _places(runs: Sequence[Ancestor], parents: dict[Path, list[Path]]) -> dict[Path, tuple[float, float]]:
    """Return column and height of each run, in every column in the order of the parents' heights."""
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


def _curve(axes: "Axes", curve: Curve) -> None:
    steps, values = zip(*curve.loss, strict=True)
    axes.plot(steps, values, color=colour(0), linewidth=1, alpha=0.35)
    axes.plot(steps, _smooth(values), color=colour(0), linewidth=1.8)
    if curve.valid_loss:
        axes.plot(*zip(*curve.valid_loss, strict=True), "o", color=colour(1), markersize=5)
    axes.set_title(curve.name, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("step", fontsize=8)


def _smooth(values: Sequence[float]) -> Floats:
    """Return the mean over a window of a twentieth of the curve, shorter at its ends."""
    width = max(1, len(values) // 20)
    window = np.ones(width)
    sums = np.convolve(values, window, mode="same")
    result: Floats = sums / np.convolve(np.ones(len(values)), window, mode="same")
    return result


def _rows(axes: "Axes", methods: Sequence[str]) -> None:
    axes.set_yticks(range(len(methods)))
    axes.set_yticklabels(methods, parse_math=False)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    settings: Any = _SETTINGS
    with mpl.rc_context(settings):
        yield


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _as_svg(figure: "Figure", title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """Return the bare `<svg>`, labelled, without fixed size; `title` is plain words, unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Ids must differ between the figures of a page, where `figure_1` would stand in each.
    prefix = re.sub(r"\W+", "-", title).lower()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    assert width is not None
    style = f"max-width: {float(width.group(1)) * 1.6:.0f}px"
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg, count=1)
    label = rf'\1role="img" aria-label="{title}" style="{style}"'
    return _with_variables(re.sub(r'(<svg [^>]*?)width="[^"]*"', label, svg, count=1))


def _with_variables(svg: str) -> str:
    names = _VARIABLES | {colour(k): f"--m{k}" for k in range(PALETTE)}
    svg = re.sub("|".join(names), lambda found: f"var({names[found.group()]})", svg)
    return svg.replace("'DejaVu Sans'", "var(--font)")
