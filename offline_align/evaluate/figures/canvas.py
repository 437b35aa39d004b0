"""The canvas of all figures: SVG whose colours are CSS variables of the page, one drawing for light and dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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


def name_rows(axes: "Axes", methods: Sequence[str]) -> None:
    """Give each method a line of the figure, the first one on top."""
    axes.set_yticks(range(len(methods)))
    axes.set_yticklabels(methods, parse_math=False)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9)


@contextmanager
def style() -> Iterator[None]:
    """Draw in the page's colours and font inside this context."""
    import matplotlib as mpl

    settings: Any = _SETTINGS
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: "Figure", title: str) -> str:
    """Return the figure as an `<svg>` element; `title` is plain words, unique on the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """Return the bare `<svg>`, labelled, without fixed size."""
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
