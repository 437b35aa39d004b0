"""The three files of the report; the page is self-contained, escaped and well-formed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import StorageError
from offline_align.evaluate import report
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.report import Report, runs_behind, write_report
from offline_align.evaluate.results import Compared, Judgement, build_results
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import PROMPTS, WriteRun, rows_for

ATTACK = '</p><script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>'
VOID = {"meta", "link", "input", "br", "img"}


class Outline(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(write_run: WriteRun, tmp_path: Path, answers: list[str], quality: bool = False) -> Path:
    a, b = write_run("a", rows_for(["fine"] * 3), "sft"), write_run("<b>", rows_for(answers))
    comparison = load_comparison([a, b], BadRows(OnBadRow.fail, None))
    scores = np.array([[[1.0, 2.0]], [[3.0, 3.0]], [[np.nan, 9.0]]])
    judgement = Judgement("reward model", scores, {"kind": "reward_model"})
    truth = np.ones((3, 1, 2)) if quality else None
    compared = Compared(comparison, judgement, truth)
    results = build_results(compared, EvaluateSection(bootstrap_samples=50), seed=0)
    made = Report(results, compared, runs=runs_behind(compared))
    paths = write_report(tmp_path / "out", made, made.pictures())
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    return tmp_path / "out"


def outline(page: Path) -> Outline:
    parsed = Outline()
    parsed.feed(page.read_text(encoding="utf-8"))
    parsed.close()
    assert parsed.stack == []
    return parsed


def test_answers_cannot_inject_anything(write_run: WriteRun, tmp_path: Path) -> None:
    page = outline(write(write_run, tmp_path, [ATTACK, "", "ok"]) / "report.html")
    assert ATTACK in page.text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "no answer" in page.text


def test_the_page_fetches_nothing(write_run: WriteRun, tmp_path: Path) -> None:
    page = outline(write(write_run, tmp_path, ["x"] * 3) / "report.html")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    policy = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'")
    source = (tmp_path / "out" / "report.html").read_text()
    assert "@import" not in source
    assert re.findall(r"url\((?!#)", source) == []


def test_the_page_can_be_used_without_sight_or_mouse(write_run: WriteRun, tmp_path: Path) -> None:
    page = outline(write(write_run, tmp_path, ["x"] * 3, quality=True) / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert links
    assert set(links) <= set(ids)
    assert all(a.get("role") == "img" and a.get("aria-label") for tag, a in page.tags if tag == "svg")
    assert all(a.get("scope") for tag, a in page.tags if tag == "th")
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "input" and a["type"] == "search")
    assert dict(page.tags)["html"]["lang"] == "en"
    assert "True quality" in page.text


def test_prompts_without_a_verdict_are_shown_without_a_best_answer(write_run: WriteRun, tmp_path: Path) -> None:
    page = outline(write(write_run, tmp_path, ["x"] * 3) / "report.html")
    assert "no score" in page.text
    assert "2 of 3 prompts could be judged" in page.text
    # One clear winner, one tie of two, one prompt without a verdict.
    assert len([1 for _, a in page.tags if a.get("class") == "tag best"]) == 3


def test_report_json_is_strict_and_has_everything(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write(write_run, tmp_path, ["x"] * 3, quality=True)

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    content = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert list(content) == [
        *["format", "methods", "competing", "baseline", "judge", "prompts", "judged_prompts", "samples_per_prompt"],
        *["confidence", "bootstrap_samples", "seed", "rank_score", "overall", "win_rates", "answers"],
        *["group_by", "groups", "rows", "files", "lineage"],
    ]
    assert content["files"] == {"sft": "../a/generations.jsonl", "<b>": "../<b>/generations.jsonl"}
    assert [run["stage"] for run in content["lineage"]] == ["generate"]
    assert [row["id"] for row in content["rows"]] == ["p1", "p2", "p3"]


def test_many_prompts_are_thinned_evenly(write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SHOWN_PROMPTS", 2)
    page = outline(write(write_run, tmp_path, ["first", "second", "third"]) / "report.html")
    assert "2 of 3 prompts, evenly spaced" in page.text
    assert "first" in page.text
    assert "third" in page.text
    assert "second" not in page.text
    assert PROMPTS[1]["prompt"][0]["content"] not in page.text


def test_curves_and_histogram_of_the_parents_are_embedded(write_run: WriteRun, tmp_path: Path) -> None:
    a = write_run("a", rows_for(["x"] * 3), "sft")
    (a.parent / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    label = write_run("label", rows_for(["x"] * 3)).parent
    (label / "reward_histogram.png").write_bytes(b"\x89PNG")

    write_manifest(label, "label", "k", [], [], [label / "generations.jsonl"], {})
    b = write_run("b", rows_for(["y"] * 3))
    write_manifest(b.parent, "generate", "k", [], [label], [b], {"method": "ca"})
    comparison = load_comparison([a, b], BadRows(OnBadRow.fail, None))
    judgement = Judgement("j", np.ones((3, 1, 2)), {})
    compared = Compared(comparison, judgement)
    results = build_results(compared, EvaluateSection(bootstrap_samples=10), 0)
    made = Report(results, compared, runs=runs_behind(compared))
    page = outline(write_report(tmp_path / "out", made, made.pictures())[-1])
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    assert pictures == ["data:image/png;base64,iVBORw=="]
    assert "Training" in [a.get("aria-label") for tag, a in page.tags if tag == "svg"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="out"):
        write(write_run, tmp_path, ["x"] * 3)
