"""Which method to take: means over prompts and seeds, several judges, hours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.errors import StorageError
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.other_judges import other_verdicts
from offline_align.evaluate.parts.study import Verdict, draw, study_section
from offline_align.evaluate.results import Compared, Judgement
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import WriteChain, rows_for
from tests.unit.evaluate.parts.test_seeds import answered

SETTINGS = EvaluateSection(bootstrap_samples=4000)


def comparison_of(files: list[Path]) -> Any:
    return load_comparison(files, BadRows(OnBadRow.fail, None))


def judged(files: list[Path], scores: Any, quality: Any = None) -> Compared:
    """Return a comparison with scores [prompts, methods] of a judge called rm."""
    known = None if quality is None else np.array(quality, dtype=float)[:, None]
    table = np.array(scores, dtype=float)[:, None]
    return Compared(comparison_of(files), Judgement("rm", table, {}), known)


def studied(compared: Compared, *others: Verdict) -> Any:
    section = study_section(compared, SETTINGS, 1, others)
    assert section is not None
    return section


def test_draws_hold_the_uncertainty_over_prompts_and_over_seeds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1, 400)).repeat(3, axis=0)
    still = draw([scores], 4000, 1)
    assert still.draws.std() == pytest.approx(scores.std() / 20, rel=0.05)
    # Seeds that shift all prompts alike: only the spread over seeds counts.
    moved = draw([np.array([[-1.0] * 8, [0.0] * 8, [1.0] * 8])], 20_000, 1)
    low, high = np.quantile(moved.draws, [0.025, 0.975])
    expected = student.ppf(0.975, 2) / 3**0.5
    assert (low, high) == pytest.approx((-expected, expected), rel=0.05)


def test_equal_methods_share_the_chance_to_be_best() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 1, 500))
    even = draw([one - one.mean(), two - two.mean(), one - one.mean() - 1], 4000, 1).chances()
    assert even == pytest.approx([0.5, 0.5, 0], abs=0.05)
    assert draw([one, one], 10, 1).chances() == pytest.approx([0.5, 0.5])


def test_the_best_method_and_its_lead(tmp_path: Path) -> None:
    files = [answered(tmp_path, f"{m}{s}", m, s) for m in ("sft", "fa") for s in (1, 2, 3)]
    close = studied(judged(files, [[0.0, 0.1, 0.2, 1.0, 1.1, 1.2]] * 3))
    found = close.content["judges"]["rm"]
    assert (found["best"], found["second"], found["prompts"]) == ("fa", "sft", 3)
    assert found["lead"]["mean"] == pytest.approx(1)
    assert close.findings[0].startswith("By rm, take fa: it is the best method with a chance above")
    assert close.content["methods"] == {"sft": [1, 2, 3], "fa": [1, 2, 3]}
    # The same means, with seeds that differ much: no sure recommendation.
    unsure = studied(judged(files, [[-3.0, 0.1, 3.2, -2.0, 1.1, 4.2]] * 3))
    assert unsure.findings[0].startswith("By rm, fa comes first, but only with a chance of ")
    assert unsure.content["judges"]["rm"]["lead"]["low"] < 0


def test_ranks_compare_policies_of_the_same_seed(tmp_path: Path) -> None:
    """Seed 2 of the worse method is above seed 1 of the better one, but never in the same set."""
    files = [answered(tmp_path, f"{m}{s}", m, s) for m in ("sft", "fa") for s in (1, 2)]
    files.append(answered(tmp_path, "rwr", "rwr", 7))
    scores = [[0.0, 5.0, 1.0, 6.0, 3.0]] * 3
    found = studied(judged(files, scores)).content["judges"]["rm"]["methods"]
    assert {name: one["rank_score"]["mean"] for name, one in found.items()} == {"sft": 1.5, "fa": 2.5, "rwr": 2.0}


def test_only_the_highest_target_of_a_policy_competes(write_chain: WriteChain, tmp_path: Path) -> None:
    files = [
        answered(tmp_path, "sft", "sft", 1),
        write_chain([1.0, 2.0, 3.0], {2.0: ["a", "b", "c"], -2.0: ["d", "e", "f"]}),
    ]
    found = studied(judged(files, [[0.0, 1.0, 9.0]] * 3)).content
    assert list(found["methods"]) == ["sft", "ca(2.0)"]
    assert found["judges"]["rm"]["best"] == "ca(2.0)"


def test_one_method_is_no_comparison(write_chain: WriteChain) -> None:
    files = [write_chain([1.0, 2.0, 3.0], {2.0: ["a", "b", "c"], -2.0: ["d", "e", "f"]})]
    assert study_section(judged(files, [[1.0, 0.0]] * 3), SETTINGS, 1) is None


def test_true_quality_decides_and_other_judges_are_named(tmp_path: Path) -> None:
    files = [answered(tmp_path, m, m, 1) for m in ("sft", "fa")]
    compared = judged(files, [[0.0, 1.0]] * 3, quality=[[5.0, 1.0]] * 3)
    section = studied(compared, Verdict("gpt", np.array([[0.0, 1.0], [0.0, 2.0], [np.nan, 0.0]])))
    assert section.content["decided_by"] == "true quality"
    assert section.findings[0].startswith("By true quality, take sft")
    assert "rm puts fa first (a chance above 99 %)." in section.findings
    assert section.content["judges"]["gpt"]["prompts"] == 2
    assert section.findings[-1].startswith("Every method was trained with one seed")
    # A table column for each judge and group.
    assert section.tables[0].header[2:6] == [
        "vicuna, true quality",
        "mt_bench, true quality",
        "mean, true quality",
        "chance to be best",
    ]


def test_hours_are_means_over_seeds_beside_the_dearest_method(tmp_path: Path) -> None:
    files = [answered(tmp_path, f"{m}{s}", m, s) for m in ("sft", "fa") for s in (1, 2)]
    for name, hours in (("sft1", 1.0), ("sft2", 2.0), ("fa1", 3.0), ("fa2", 3.0)):
        extra = {"method": name[:-1], "seconds": hours * 3600, "ranks": 1}
        write_manifest(tmp_path / name, name[:-1], name, [], [], [tmp_path / name / "checkpoints" / "step_1"], extra)
    section = studied(judged(files, [[0.0, 0.0, 1.0, 1.0]] * 3))
    assert section.content["hours"] == {
        "sft": {"hours": 1.5, "of_dearest": 0.5},
        "fa": {"hours": 3.0, "of_dearest": 1.0},
    }
    assert section.findings[1] == "sft takes 0.50 times as many hours as fa."


def evaluated(root: Path, name: str, files: list[Path], rows: Any, judge: str = "gpt") -> Path:
    """Write a finished `evaluate` run with a report."""
    folder = root / name
    folder.mkdir()
    path = folder / "report.json"
    path.write_text(json.dumps({"judge": {"name": judge}, "rows": rows}))
    write_manifest(folder, "evaluate", name, files, [], [path], {})
    return folder


def test_other_judges_of_the_same_answers(tmp_path: Path) -> None:
    files = [answered(tmp_path, m, m, 1) for m in ("sft", "fa")]
    compared = judged(files, [[0.0, 1.0]] * 3)
    rows = [{"id": one, "scores": {"sft": 1.0, "fa": value}} for one, value in (("p3", 3.0), ("p2", None), ("p1", 1.0))]
    same = evaluated(tmp_path, "same", files, rows)
    namesake = evaluated(tmp_path, "namesake", files, rows, judge="rm")
    files[0].with_name("other.jsonl").write_text(json.dumps(rows_for(["z"] * 3)[0]) + "\n")
    other = evaluated(tmp_path, "other", [files[0].with_name("other.jsonl")], rows)
    found = other_verdicts(compared, [same, namesake, other, tmp_path / "sft"])
    assert [one.judge for one in found] == ["gpt", "rm (namesake)"]
    np.testing.assert_array_equal(found[0].scores, [[1, 1], [1, np.nan], [1, 3]])
    broken = evaluated(tmp_path, "broken", files, rows[:1])
    with pytest.raises(StorageError, match=r"broken/report.json: cannot be read as a report"):
        other_verdicts(compared, [broken])
