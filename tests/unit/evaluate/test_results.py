"""The report's numbers against values computed by hand, and the tables that show them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import ConfigError, DataError
from offline_align.evaluate.comparison import Column, Comparison, load_comparison
from offline_align.evaluate.results import Compared, Judgement, build_results, choose_baseline
from offline_align.evaluate.statistics import Floats
from offline_align.evaluate.tables import build_tables, escape, headline, markdown_report
from tests.unit.evaluate.conftest import WriteRun, rows_for

SCORES = np.array([[[1.0, 2.0]], [[3.0, 3.0]], [[5.0, 9.0]]])


@pytest.fixture
def comparison(write_run: WriteRun) -> Comparison:
    a = write_run("a", rows_for(["one two", "one", "one one one"]), "sft")
    rows = rows_for(["", "x y", "z"])
    rows[0]["finish_reason"] = "length"
    return load_comparison([a, write_run("b", rows, "ca", 5.0)], BadRows(OnBadRow.fail, None))


def build(
    comparison: Comparison,
    scores: Floats = SCORES,
    quality: Floats | None = None,
    details: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    judgement = Judgement("reward model", scores, details or {"kind": "reward_model"})
    return build_results(Compared(comparison, judgement, quality), EvaluateSection(**settings), seed=5)


def test_overall_numbers(comparison: Comparison) -> None:
    results = build(comparison)
    sft, ca = results["overall"]["sft"], results["overall"]["ca"]
    assert (sft["score"]["mean"], ca["score"]["mean"]) == (3.0, pytest.approx(14 / 3))
    assert ca["win_rate"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert sft["win_rate"]["mean"] == 0.5
    assert ca["rank_score"]["mean"] == pytest.approx((2 + 1.5 + 2) / 3)
    assert ca["score"]["low"] <= ca["score"]["mean"] <= ca["score"]["high"]
    assert results["win_rates"]["sft"]["ca"]["mean"] == pytest.approx(1 - 2.5 / 3)
    assert "ca" not in results["win_rates"]["ca"]
    assert "true_quality" not in sft


def test_groups_follow_the_column(comparison: Comparison) -> None:
    results = build(comparison)
    assert {name: group["prompts"] for name, group in results["groups"].items()} == {
        "vicuna": 2,
        "mt_bench": 1,
    }
    assert results["groups"]["vicuna"]["methods"]["ca"]["score"]["mean"] == 5.5
    assert build(comparison, group_by="absent")["groups"] == {}


def test_answers_are_described(comparison: Comparison) -> None:
    about = build(comparison)["answers"]
    assert about["sft"]["mean_words"] == 2.0
    assert about["sft"]["mean_characters"] == pytest.approx((7 + 3 + 11) / 3)
    assert about["sft"]["distinct_1"] == pytest.approx(2 / 6)
    assert about["ca"]["finish_reasons"] == {"length": pytest.approx(1 / 3), "stop": pytest.approx(2 / 3)}
    assert about["ca"]["empty"] == pytest.approx(1 / 3)


def test_true_quality_stands_beside_the_scores(comparison: Comparison) -> None:
    results = build(comparison, quality=SCORES * 2)
    assert results["overall"]["sft"]["true_quality"]["mean"] == 6.0
    assert results["rows"][2]["true_quality"] == {"sft": 10.0, "ca": 18.0}
    assert "true quality" in build_tables(results)[0].header


def test_prompts_without_a_score_are_left_out_and_counted(comparison: Comparison) -> None:
    scores = SCORES.copy()
    scores[1, 0, 1] = np.nan
    results = build(comparison, scores)
    assert (results["prompts"], results["judged_prompts"]) == (3, 2)
    assert results["overall"]["sft"]["score"]["mean"] == 3.0
    assert results["overall"]["ca"]["win_rate"]["mean"] == 1.0
    assert results["rows"][1]["scores"] == {"sft": 3.0, "ca": None}
    assert list(results["groups"]) == ["vicuna"]
    text = markdown_report(results)
    assert "2 of 3 prompts could be judged (an answer that is too long has no score)" in text
    json.dumps(results, allow_nan=False)


def test_no_score_at_all_is_an_error(comparison: Comparison) -> None:
    with pytest.raises(DataError, match="no prompt has a score for every method"):
        build(comparison, np.full((3, 1, 2), np.nan, dtype=np.float64))


def test_samples_of_a_prompt_are_averaged_first(write_run: WriteRun) -> None:
    rows = [row | {"sample_index": k} for row in rows_for(["x"] * 3) for k in (0, 1)]
    files = [write_run(name, rows) for name in ("a", "b")]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    scores = np.arange(12, dtype=np.float64).reshape(3, 2, 2)
    results = build(comparison, scores)
    assert results["rows"][0]["scores"] == {"a": 1.0, "b": 2.0}
    assert results["samples_per_prompt"] == 2
    assert ", 2 answers each" in markdown_report(results)


def test_baseline() -> None:
    def columns(*names: str, pool: str | None = None) -> list[Column]:
        return [Column(name, Path(name), None, None, pool=pool) for name in names]

    assert choose_baseline(columns("fa", "sft"), None) == "sft"
    assert choose_baseline(columns("fa", "ca"), None) == "fa"
    assert choose_baseline(columns("fa", "ca"), "ca") == "ca"
    seeds = columns("sft seed 1", "sft seed 2", pool="sft")
    assert choose_baseline([*columns("ca"), *seeds], None) == "sft seed 1"
    with pytest.raises(ConfigError, match=r"evaluate\.baseline=dpo: no such method; there are fa, ca"):
        choose_baseline(columns("fa", "ca"), "dpo")


def test_the_same_seed_gives_the_same_report(comparison: Comparison) -> None:
    assert json.dumps(build(comparison)) == json.dumps(build(comparison))


@pytest.mark.parametrize(("high", "low"), [("ca(5.0)", "ca(-2.0)"), ("ca(quantile 12)", "ca(quantile 5)")])
def test_the_headline_names_a_method_that_competes(high: str, low: str) -> None:
    means = {"sft": 0.0, high: 1.0, low: 2.0}
    overall = {name: {"score": {"mean": mean}, "win_rate": {"mean": 0.9, "low": 0.8}} for name, mean in means.items()}
    results = {"methods": [*means], "competing": ["sft", high], "overall": overall, "baseline": "sft", "judge": {}}
    assert headline(results) == f"{high} scores highest and wins against sft on 90% of the prompts."


def test_headline_says_what_chance_could_explain(comparison: Comparison) -> None:
    assert headline(build(comparison)).endswith(", which chance could explain.")
    clear = np.array([[[1.0, 2.0]]] * 3)
    assert headline(build(comparison, clear)) == "ca scores highest and wins against sft on 100% of the prompts."
    assert headline(build(comparison, clear[:, :, ::-1])) == "No method scores above the baseline, sft."


def test_markdown_has_every_table_with_whole_rows(comparison: Comparison) -> None:
    text = markdown_report(build(comparison))
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1
    assert "| ca | 4.67 [" in text


def test_a_served_judge_reports_failures_and_tokens(comparison: Comparison) -> None:
    details = {"verdicts": 3, "unreadable_verdicts": 1, "prompt_tokens": 12345, "completion_tokens": 67}
    text = markdown_report(build(comparison, details=details))
    assert "1 of 3 verdicts could not be read; 12,345 tokens sent, 67 received." in text


def test_markdown_shows_marks_as_they_are() -> None:
    assert escape("a|b_*c*\nd <i>") == "a\\|b\\_\\*c\\* d \\<i>"
