"""The report in a real browser: no network, search, filters, light and dark mode, phone width."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.catalogue import Evidence, report_sections
from offline_align.evaluate.parts.runs import runs_section
from offline_align.evaluate.report import Report, runs_behind, write_report
from offline_align.evaluate.results import Compared, Judgement, build_results
from offline_align.evaluate.samples import samples_of_runs
from offline_align.lineage.manifest import describe_parent
from tests.unit.evaluate.conftest import PROMPTS, WriteChain, WriteRun, rows_for

pytest_plugins = ["tests.unit.evaluate.conftest"]

TARGETS = (-1.0, 0.0, 1.0)
COLUMNS = 1 + len(TARGETS)
SETTINGS = EvaluateSection(bootstrap_samples=100, ppo_hours=730.0)


@pytest.fixture
def report(write_run: WriteRun, write_chain: WriteChain, tmp_path: Path) -> Path:
    """Return the page of a comparison with every part: targets, drift, cost."""
    texts = {t: [f"river {t} " + "word " * 30, "Danube", "one two three"] for t in TARGETS}
    asked = write_chain([8.0, 12.0, 10.0, 11.0] * 25, texts)
    files = [write_run("sft", rows_for(["blue sky", "Rhine", "three"]), "sft"), asked]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), 1, COLUMNS))
    scores = 10 + 2 * np.array([0.0, *TARGETS]) + 0.4 * noise
    compared = Compared(comparison, Judgement("reward model", scores, {"kind": "reward_model"}))
    content = describe_parent(tmp_path / "reward" / "checkpoints" / "step_1").content_sha256
    sections = report_sections(Evidence(SETTINGS, 0, compared, judge_content=content))
    results = build_results(compared, SETTINGS, 0)
    made = Report(results, compared, sections, runs_behind(compared))
    return write_report(tmp_path / "out", made, made.pictures())[-1]


def test_the_page_works_without_any_network(report: Path, show: Any) -> None:
    opened = show(report)
    for name in ("following", "optimisation", "drift", "cost", "significance", "origin", "samples"):
        assert opened.page.locator(f"#{name}").is_visible(), name
    assert opened.page.locator("figure svg").count() >= 6
    opened.check(report)


def test_search_keeps_the_prompts_that_have_the_words(report: Path, show: Any) -> None:
    opened = show(report)
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("rhine")
    shown = [one for one in opened.page.locator("details.set").all() if one.is_visible()]
    assert len(shown) == 1
    assert "Name a river" in shown[0].inner_text()
    assert opened.page.locator("#status").inner_text() == "1 of 3 prompts"
    opened.page.locator("#search").fill("")
    opened.page.locator("#group").select_option("vicuna")
    assert opened.page.locator("#status").inner_text() == "2 of 3 prompts"
    opened.check(report)


def test_answers_stand_side_by_side_and_can_be_left_out(report: Path, show: Any) -> None:
    opened = show(report)
    answers = opened.page.locator("details.set").first.locator(".answer")
    places = [answer.bounding_box() for answer in answers.all()]
    assert len(places) == COLUMNS
    assert places[0]["y"] == places[1]["y"] and places[0]["x"] < places[1]["x"]
    opened.page.locator("input[name=method][value=sft]").uncheck()
    assert [answer.is_visible() for answer in answers.all()] == [False, True, True, True]


def test_answers_at_the_targets_alone(report: Path, show: Any) -> None:
    opened = show(report)
    opened.page.locator("#targets").click()
    answers = opened.page.locator("details.set").first.locator(".answer")
    visible = [answer.get_attribute("data-method") for answer in answers.all() if answer.is_visible()]
    assert visible == [f"ca({target})" for target in TARGETS]
    assert not opened.page.locator("input[name=method][value=sft]").is_checked()
    opened.page.locator("#targets").click()
    assert all(answer.is_visible() for answer in answers.all())


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(report: Path, show: Any, dark: bool) -> None:
    opened = show(report, dark=dark)
    opened.shoot(f"report_{'dark' if dark else 'light'}")
    style = "getComputedStyle(document.body)"
    ink, page = (opened.page.evaluate(f"{style}.{name}") for name in ("color", "backgroundColor"))
    assert (luminance(page) < 0.2) == dark
    light, shade = sorted((luminance(ink), luminance(page)), reverse=True)
    assert (light + 0.05) / (shade + 0.05) > 7


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, 0 to 1."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_a_phone_need_not_scroll_sideways(report: Path, show: Any) -> None:
    opened = show(report, width=360, height=740)
    opened.shoot("report_phone")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    opened.check(report)


def test_everything_can_be_reached_by_keys(report: Path, show: Any) -> None:
    opened = show(report)
    wanted, reached = {"search", "group", "toggle", "targets", "SUMMARY"}, set()
    for _ in range(120):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if wanted <= reached:
            break
    assert wanted <= reached
    opened.page.locator("details.set summary").nth(1).focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.locator("details.set").nth(1).get_attribute("open") is not None


@pytest.fixture
def runs_page(write_run: WriteRun, write_chain: WriteChain, tmp_path: Path) -> Path:
    """Return the page of runs without a judge: their lineage, curves and answers."""
    asked = write_chain([8.0, 12.0, 10.0, 11.0] * 25, {t: ["river " * 30, "Danube", "three"] for t in TARGETS})
    write_run("sft", rows_for(["blue sky", "Rhine", "three"]), "sft")
    lines = [f'{{"step": {k}, "loss": {5 / k}, "accuracy": {1 - 1 / k}}}\n' for k in range(1, 30)]
    (tmp_path / "reward" / "metrics.jsonl").write_text("".join(lines))
    runs = runs_behind(None, [asked.parent, tmp_path / "sft"])
    results = {"format": 1, "judge": None, "group_by": "benchmark"}
    made = Report(results, None, [runs_section(runs, SETTINGS)], runs, samples_of_runs(runs))
    return write_report(tmp_path / "out", made, made.pictures())[-1]


def test_runs_alone_have_a_page(runs_page: Path, show: Any) -> None:
    opened = show(runs_page)
    opened.shoot("runs")
    for name in ("runs", "origin", "samples"):
        assert opened.page.locator(f"#{name}").is_visible(), name
    assert opened.page.locator("#origin svg").count() == 2
    assert "reward: accuracy" in opened.page.locator("#origin").inner_text()
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("rhine")
    assert opened.page.locator("#status").inner_text() == "1 of 3 prompts"
    answers = opened.page.locator("details.set:visible .answer")
    assert answers.count() == COLUMNS
    assert "no score" not in opened.page.locator("#samples").inner_text()
    opened.check(runs_page)


def test_runs_alone_fit_a_phone(runs_page: Path, show: Any) -> None:
    opened = show(runs_page, width=360, height=740, dark=True)
    opened.shoot("runs_phone_dark")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    opened.check(runs_page)
