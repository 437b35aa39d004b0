"""The paper's Figure 3: rewards before and after normalisation, side by side in one PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offline_align.errors import StorageError
from offline_align.label.statistics import share_within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RAW_COLOUR = "#64748b"
NORMALISED_COLOUR = "#0f766e"
INK = "#334155"
USUAL_RANGE = 2.5
VISIBLE = (0.001, 0.999)


def draw_reward_histogram(path: Path, raw: ArrayLike, normalised: ArrayLike, bins: int) -> Path:
    """Write two histograms, raw [rows] on the left and normalised [rows] on the right; return `path`.

    Rewards outside the 0.1 % and 99.9 % quantiles are counted in the outermost bars, so that one
    outlier cannot flatten the histogram. Raises StorageError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=144, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    before, after = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (raw, normalised))
    _draw(left, before, bins, RAW_COLOUR, "Raw reward", f"mean {before.mean():.3g}, std {before.std():.3g}")
    note = f"{share_within(after, USUAL_RANGE):.1%} within ±{USUAL_RANGE}"
    _draw(right, after, bins, NORMALISED_COLOUR, "Normalised reward", note)
    right.axvspan(-USUAL_RANGE, USUAL_RANGE, color=NORMALISED_COLOUR, alpha=0.07, zorder=0)
    return _save(figure, path)


def _draw(axes: "Axes", values: NDArray[np.float64], bins: int, colour: str, title: str, note: str) -> None:
    low, high = _visible_range(values)
    outside = int(np.count_nonzero((values < low) | (values > high)))
    axes.hist(np.clip(values, low, high), bins=bins, range=(low, high), color=colour, linewidth=0)
    axes.axvline(float(np.clip(values.mean(), low, high)), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(title, loc="left", fontweight="bold", color=INK)
    axes.set_title(note, loc="right", fontsize=9, color=INK)
    rest = f" ({outside:,} beyond the axis are in the outermost bars)" if outside else ""
    axes.set_xlabel(f"reward of {values.size:,} rows{rest}", fontsize=9, color=INK)
    axes.set_ylabel("rows", fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _visible_range(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = (float(value) for value in np.quantile(values, VISIBLE, method="nearest"))
    padding = 0.02 * (high - low) or 0.5 * max(1.0, abs(low))
    return low - padding, high + padding


def _save(figure: "Figure", path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; free space or choose another run.dir") from error
    return path
