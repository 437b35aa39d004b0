"""Figures are well-formed SVG in the page's colours, for any name and number of methods."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from offline_align.evaluate import figures
from offline_align.evaluate.ancestry import Ancestor, Curve
from offline_align.evaluate.figures.canvas import VARIABLES
from offline_align.lineage import Manifest

MANIFEST = Manifest("", "", "", {}, [], [], [], {})
NASTY = ["a$b_$", "<script>alert(1)</script>", 'q"&', "sft", *(f"m{k}" for k in range(8))]


def ancestor(run_dir: Path, stage: str, method: str, parents: tuple[Path, ...], depth: int) -> Ancestor:
    return Ancestor(run_dir, stage, method, parents, depth, MANIFEST)


def draw_all(names: list[str]) -> dict[str, str]:
    estimates = [{"mean": k, "low": k - 0.5, "high": k + 0.5} for k in range(len(names))]
    scores = np.random.default_rng(0).normal(size=(20, len(names)))
    root = ancestor(Path("/r"), "sft", "", (), 0)
    runs = [
        root,
        *(ancestor(Path("/r", str(k)), name, "", (root.run_dir,), 1) for k, name in enumerate(names)),
    ]
    curves = [Curve(name, "loss", ((1, 2.0), (2, 1.0)), ((2, 1.5),)) for name in names]
    points = [(float(k), one) for k, one in enumerate(estimates)]
    rounds = [(0, estimates[0]), (1, estimates[-1])]
    panels = {"reward": dict.fromkeys(names, rounds), **{name: {"one": rounds} for name in names}}
    drawn = {
        "estimates": figures.draw_estimates("Mean score", names, estimates, 1.0),
        "spread": figures.draw_distributions("Spread", names, scores),
        "rank": figures.draw_rank_scores("Rank score", names, [2.0] * len(names)),
        "curves": figures.draw_curves("Training loss", curves),
        "lineage": figures.draw_lineage("Lineage", runs),
        "rounds": figures.draw_rounds("Rounds", panels),
        "gains": figures.draw_gains("Gain by kl", names, points, range(len(names)), "nats"),
    }
    return {name: picture.svg() for name, picture in drawn.items()}


def test_a_bitmap_has_the_size_of_its_figure() -> None:
    """Also if the height in inches times the resolution is a whole number up to rounding."""
    estimate = {"mean": 1.0, "low": 0.5, "high": 1.5}
    panels = {str(k): {"dpo": [(0, estimate)]} for k in range(4)}
    picture = figures.draw_rounds("Rounds", panels)
    assert picture.pixels().shape == (539, 1056, 3)


@pytest.mark.parametrize("names", [["sft"], NASTY], ids=["one", "nasty"])
def test_every_figure_is_well_formed_and_escaped(names: list[str]) -> None:
    for svg in draw_all(names).values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("role") == "img"
        assert "<script" not in svg
        shown = {text for element in root.iter() if (text := (element.text or "").strip())}
        # A long name is cut, and never read as a formula.
        assert all(any(name[:17] in text for text in shown) for name in names)


def test_colours_are_variables_of_the_page() -> None:
    for svg in draw_all(["sft", "fa"]).values():
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg))
        assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours
    style = (Path(figures.__file__).parents[1] / "templates" / "style.css").read_text()
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", "".join(draw_all(NASTY).values())))
    assert used <= set(re.findall(r"(--[a-z0-9]+):", style))
    light = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]{6})", style.partition("@media (prefers-color-scheme")[0]))
    assert {name: light[name] for name in VARIABLES.values()} == {name: tone for tone, name in VARIABLES.items()}


def test_a_bitmap_has_the_light_colours_of_the_page() -> None:
    estimate = {"mean": 1.0, "low": 0.5, "high": 1.5}
    pixels = figures.draw_estimates("Mean score", ["sft", "fa"], [estimate] * 2, None).pixels()
    height, width, channels = pixels.shape
    assert (channels, width > height > 50) == (3, True)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    found = {"#" + bytes(pixel).hex() for pixel in pixels.reshape(-1, 3)}
    assert {tone for tone, name in VARIABLES.items() if name in ("--m0", "--m1")} <= found


def test_ids_differ_between_figures_and_drawing_is_repeatable() -> None:
    first, again = draw_all(["sft", "fa"]), draw_all(["sft", "fa"])
    assert first == again
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in first.values()]
    flat = [one for some in ids for one in set(some)]
    assert len(flat) == len(set(flat))
    for svg in first.values():
        referenced = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert referenced <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_lineage_draws_no_arrow_that_another_one_implies() -> None:
    a, b, c = (Path("/r", name) for name in "abc")
    runs = [ancestor(a, "x", "", (), 0), ancestor(b, "y", "", (a,), 1), ancestor(c, "z", "", (a, b), 2)]
    with_short_cut = figures.draw_lineage("Lineage", runs).svg()
    runs[2] = ancestor(c, "z", "", (b,), 2)
    assert figures.draw_lineage("Lineage", runs).svg() == with_short_cut


@pytest.mark.parametrize("same_scale", [True, False])
def test_the_following_curve_is_well_formed(same_scale: bool) -> None:
    targets = [{"target": k, "reward": k, "achieved": {"mean": k, "low": k - 0.5, "high": k + 0.5}} for k in range(3)]
    svg = figures.draw_following("Following", targets, same_scale, (-1.0, 1.0)).svg()
    assert ElementTree.fromstring(svg).get("aria-label") == "Following"
    assert ("normalised reward achieved" in svg) == same_scale
