"""Write the report to TensorBoard: its numbers as scalars, its figures as images."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offline_align.evaluate.ancestry import find_histograms
from offline_align.evaluate.figures import Picture
from offline_align.evaluate.report import Report
from offline_align.evaluate.sections import contents
from offline_align.tensorboard_writer import FOLDER, silent_writer_thread

log = logging.getLogger(__name__)


def write_board(run_dir: Path, report: Report, pictures: Mapping[str, Picture], words: str) -> None:
    """Replace `tensorboard/` with scalars, histograms, figures, and the report's text `words`.

    The report itself has all of this, so a folder that cannot be written only causes a warning.
    """
    try:
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
        with silent_writer_thread():
            _write(run_dir / FOLDER, report, pictures, words)
    except OSError as error:
        log.warning("tensorboard: cannot be written; the report is complete without it: %s", error.strerror or error)


def _write(folder: Path, report: Report, pictures: Mapping[str, Picture], words: str) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for name, value in scalars(report).items():
            board.add_scalar(name, value, 0)
        if report.compared is not None:
            scores = report.compared.judgement.scores
            for k, method in enumerate(report.compared.comparison.methods):
                known = scores[:, :, k][np.isfinite(scores[:, :, k])]
                if known.size:
                    board.add_histogram(f"scores/{method}", known, 0)
        for name, picture in {**pictures, **_section_pictures(report)}.items():
            board.add_image(f"report/{name}", picture.pixels(), 0, dataformats="HWC")
        for path in find_histograms(report.runs):
            board.add_image(f"rewards/{path.parent.name}", np.asarray(imread(path))[:, :, :3], 0, dataformats="HWC")
        board.add_text("report", words, 0)


def scalars(report: Report) -> dict[str, float]:
    """Return the numbers of the report by name: `score/ca`, `optimisation/methods/fa/kl`, ...

    An estimate is represented by its mean; the figures show its interval.
    """
    found = {
        f"{quantity}/{method}": estimate["mean"]
        for method, quantities in report.results.get("overall", {}).items()
        for quantity, estimate in quantities.items()
    }
    return found | dict(_numbers(contents(report.sections), ""))


def _numbers(node: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, dict) and {"mean", "low", "high"} <= node.keys():
        yield from _numbers(node["mean"], name)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _numbers(value, f"{name}/{key}" if name else str(key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield name, float(node)


def _section_pictures(report: Report) -> dict[str, Picture]:
    return {
        f"{section.name}/{drawing.picture.title}": drawing.picture
        for section in report.sections
        for drawing in section.drawings
    }
