"""Shared style of all figures, and their export as SVG and bitmap.

Figures are drawn in the colours of the light page. In the SVG each colour is replaced by its CSS
variable from `templates/style.css`, so one drawing serves light and dark mode. A bitmap keeps the
colours.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE, LINE = "#1c2024", "#5c6670", "#e6e7e4", "#ffffff", "#c3c8cd"
METHODS = ("#4a5a6b", "#0f8a74", "#c2562d", "#3f63c8", "#9a4fb0", "#a67c00", "#c23b6b", "#2b8cab")
PALETTE = len(METHODS)
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", LINE: "--line"} | {
    one: f"--m{k}" for k, one in enumerate(METHODS)
}
BITMAP_DPI = 110
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
    """Return the colour of method `index`, the page's `--m<index>`; eight colours repeat."""
    return METHODS[index % PALETTE]


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure; `title` is plain text, unique on the page."""

    figure: "Figure"
    title: str

    def svg(self) -> str:
        """Return an `<svg>` element for the page."""
        buffer = io.StringIO()
        with style():
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _for_page(buffer.getvalue(), self.title)

    def pixels(self) -> NDArray[np.uint8]:
        """Return the figure on white as [height, width, 3]."""
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(buffer, format="rgba", dpi=BITMAP_DPI, facecolor=SURFACE)
        # matplotlib rounds down, but 4.9 inches may be stored as 4.899...
        width, height = (int(inches * BITMAP_DPI + 1e-6) for inches in self.figure.get_size_inches())
        return np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)[:, :, :3]


def name_rows(axes: "Axes", methods: Sequence[str]) -> None:
    """Label the rows of the figure with the methods, the first one on top."""
    axes.set_yticks(range(len(methods)))
    axes.set_yticklabels(methods, parse_math=False)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9)


@contextmanager
def style() -> Iterator[None]:
    """Use the page's colours and font inside this context."""
    import matplotlib as mpl

    settings: Any = _SETTINGS
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _for_page(svg: str, title: str) -> str:
    """Return the `<svg>` element alone, with an ARIA label and without a fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Each figure has ids such as `figure_1`; the prefix makes them unique on the page.
    prefix = re.sub(r"\W+", "-", title).lower()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    width = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    assert width is not None
    style = f"max-width: {float(width.group(1)) * 1.6:.0f}px"
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg, count=1)
    label = rf'\1role="img" aria-label="{title}" style="{style}"'
    return _with_variables(re.sub(r'(<svg [^>]*?)width="[^"]*"', label, svg, count=1))


def _with_variables(svg: str) -> str:
    svg = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found.group()]})", svg)
    return svg.replace("'DejaVu Sans'", "var(--font)")
