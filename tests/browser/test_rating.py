"""The rating page in a real browser: keyboard and mouse, stored and saved ratings, two raters."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from offline_align.data.records import Message, Sample
from offline_align.errors import StoppedEarly
from offline_align.evaluate.judges.human import HumanJudge

SETS = 3
METHODS = ("short", "a somewhat longer answer")
SAMPLES = [Sample(f"p{k}", (Message("user", f"Question {k}?"),), text, {}) for k in range(SETS) for text in METHODS]


@pytest.fixture
def rating_page(tmp_path: Path) -> Path:
    with pytest.raises(StoppedEarly):
        HumanJudge(tmp_path, 0).score(SAMPLES)
    return tmp_path / "rating.html"


def scale_of(page: Any, number: int, text: str) -> Any:
    """Return the row of ten buttons below an answer."""
    return page.locator("details.set").nth(number).locator(".answer", has_text=text).locator(".scale")


def open_all(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details.set').forEach((one) => { one.open = true; })")


def save(page: Any, folder: Path, name: str) -> Path:
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename.startswith("ratings_")
    path: Path = folder / name
    download.value.save_as(path)
    return path


def test_two_raters_by_clicks_and_by_keys(rating_page: Path, show: Any, tmp_path: Path) -> None:
    clicks, keys = show(rating_page), show(rating_page)
    open_all(clicks.page)
    open_all(keys.page)
    for k in range(SETS):
        scale_of(clicks.page, k, METHODS[0]).get_by_text("2", exact=True).click()
        scale_of(clicks.page, k, METHODS[1]).get_by_text("9", exact=True).click()
        for text, steps in zip(METHODS, (2, 7), strict=True):
            scale_of(keys.page, k, text).locator("input").first.focus()
            keys.page.keyboard.press("Space")
            for _ in range(steps):
                keys.page.keyboard.press("ArrowRight")
    assert keys.page.locator("#status").inner_text() == f"{SETS} of {SETS} prompts rated"
    clicks.shoot("rating")
    save(clicks.page, tmp_path, "ratings_a.jsonl")
    save(keys.page, tmp_path, "ratings_b.jsonl")
    judge = HumanJudge(tmp_path, 0)
    assert judge.score(SAMPLES) == [2.5, 8.5] * SETS
    described = judge.describe()
    assert (described["raters"], described["rated_sets"]) == (2, SETS)
    assert 0.9 < described["krippendorff_alpha"] < 1
    clicks.check(rating_page)
    keys.check(rating_page)


def test_a_half_rated_page_is_kept_and_read_as_such(rating_page: Path, show: Any, tmp_path: Path) -> None:
    opened = show(rating_page)
    for text in METHODS:
        scale_of(opened.page, 0, text).get_by_text("5", exact=True).click()
    opened.page.reload()
    assert opened.page.locator("#status").inner_text() == f"1 of {SETS} prompts rated"
    rows = [json.loads(line) for line in save(opened.page, tmp_path, "ratings_a.jsonl").read_text().splitlines()]
    assert sorted(row["score"] for row in rows) == [5, 5]
    scores = HumanJudge(tmp_path, 0).score(SAMPLES)
    assert [math.isnan(score) for score in scores] == [False] * 2 + [True] * 4


def test_the_page_hides_the_methods_and_fits_a_phone(rating_page: Path, show: Any) -> None:
    opened = show(rating_page, width=360, height=740)
    open_all(opened.page)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    scale = scale_of(opened.page, 0, METHODS[0]).bounding_box()
    assert scale["x"] >= 0 and scale["x"] + scale["width"] <= 360
