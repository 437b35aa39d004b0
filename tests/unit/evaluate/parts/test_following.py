"""The reward-following curve of hand-made policies that follow, ignore or invert their target."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.condition import AtLeastCondition, QuantileCondition
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.following import following_section, orders, rank_correlations, slopes
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.sections import Section
from offline_align.lineage.manifest import describe_parent
from tests.unit.evaluate.conftest import WriteChain, WriteRun, rows_for

SETTINGS = EvaluateSection(bootstrap_samples=100)
TARGETS = (-1.0, 0.0, 1.0, 5.0)


def section(path: Path, scores: list[list[float]], judged_by_labeller: bool = True) -> Section | None:
    comparison = load_comparison([path], BadRows(OnBadRow.fail, None))
    table = np.array(scores)[:, None, :]
    content = None
    if judged_by_labeller:
        content = describe_parent(path.parents[1] / "reward" / "checkpoints" / "step_1").content_sha256
    return following_section(Compared(comparison, Judgement("rm", table, {})), SETTINGS, 0, content)


@pytest.fixture
def answers(write_chain: WriteChain) -> Path:
    # Raw rewards with mean 10 and standard deviation 2: the paper's 5.0 lies outside of them.
    return write_chain([8.0, 12.0] * 50, {target: ["bad", "so", "good"] for target in TARGETS}, stored=5.0)


def test_a_policy_that_gives_what_it_is_asked_for_has_slope_one(answers: Path) -> None:
    found = section(answers, [[10 + 2 * t for t in TARGETS]] * 3)
    assert found is not None
    curve = found.content["policies"]["ca"]
    assert curve["unit"] == "normalised reward"
    assert curve["slope"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert [one["achieved"]["mean"] for one in curve["targets"]] == pytest.approx(list(TARGETS))
    assert curve["rank_correlation"]["mean"] == pytest.approx(1.0)
    assert curve["order"]["mean"] == 1.0
    assert curve["falls"] == []
    assert curve["stored_target"] == 5.0


def test_targets_that_no_labelled_row_has_are_flagged(answers: Path) -> None:
    found = section(answers, [[10 + 2 * t for t in TARGETS]] * 3)
    assert found is not None
    support = [one["support"] for one in found.content["policies"]["ca"]["targets"]]
    assert support == ["inside", "inside", "inside", "outside"]
    assert any("target 5 lies outside the labelled rewards (-1.00 to 1.00)" in line for line in found.findings)
    assert any("the policy's default target is 5" in line for line in found.findings)


def test_a_policy_that_turns_its_target_round_is_found_out(answers: Path) -> None:
    found = section(answers, [[10 - 2 * t for t in TARGETS]] * 3)
    assert found is not None
    curve = found.content["policies"]["ca"]
    assert curve["slope"]["mean"] == pytest.approx(-1.0)
    assert curve["falls"] == [[-1.0, 0.0], [0.0, 1.0], [1.0, 5.0]]
    assert "may not follow its target" in found.findings[0]


def test_another_judge_keeps_its_own_unit(answers: Path) -> None:
    found = section(answers, [[1.0, 2.0, 3.0, 4.0]] * 3, judged_by_labeller=False)
    assert found is not None
    curve = found.content["policies"]["ca"]
    assert curve["unit"] == "judge's score"
    assert curve["targets"][3]["achieved"]["mean"] == 4.0
    assert curve["targets"][3]["support"] == "outside"


def test_a_prompt_stands_beside_its_answers_at_every_target(answers: Path) -> None:
    found = section(answers, [[1.0, 2.0, 3.0, 4.0]] * 3)
    assert found is not None
    tables = [table for table in found.tables if table.prose]
    assert len(tables) == 2
    assert [row[0] for row in tables[0].rows] == ["-1", "0", "1", "5"]
    assert {row[1] for row in tables[0].rows} <= {"bad", "so", "good"}


def test_prompts_without_a_score_are_left_out(answers: Path) -> None:
    scores = [[10 + 2 * t for t in TARGETS]] * 2 + [[float("nan")] * 4]
    found = section(answers, scores)
    assert found is not None
    assert found.content["policies"]["ca"]["slope"]["mean"] == pytest.approx(1.0)


def test_without_several_targets_there_is_no_curve(write_run: WriteRun) -> None:
    path = write_run("a", rows_for(["x"] * 3), "ca", 1.0)
    assert section(path, [[1.0]] * 3, judged_by_labeller=False) is None


def test_a_quantile_stands_for_the_mean_reward_of_its_rows(write_chain: WriteChain) -> None:
    condition = QuantileCondition("<rm_score>{quantile}", (-0.5, 0.5), (-1.0, 0.0, 1.0), 3)
    texts = {number: ["bad", "so", "good"] for number in (1.0, 3.0)}
    path = write_chain([8.0, 12.0] * 50, texts, stored=9.0, condition=asdict(condition))
    # Raw rewards of 9 and 12 are normalised rewards of -0.5 and 1: 1.5 more for a mean reward that is 2 higher.
    found = section(path, [[9.0, 12.0]] * 3)
    assert found is not None
    curve = found.content["policies"]["ca"]
    assert [(one["target"], one["reward"]) for one in curve["targets"]] == [(1.0, -1.0), (3.0, 1.0)]
    assert curve["slope"]["mean"] == pytest.approx(0.75)
    assert (curve["condition"], curve["stored_target"]) == ("quantile", 3.0)
    assert "raising the mean reward of the target's quantile by 1 changes the reward by 0.75" in found.findings[0]
    assert found.tables[0].rows[1][0] == "3 (mean reward 1.00)"
    names = load_comparison([path], BadRows(OnBadRow.fail, None)).methods
    assert names == ("ca(quantile 1)", "ca(quantile 3)")


def test_answers_that_reach_their_bound_are_counted(write_chain: WriteChain) -> None:
    condition = AtLeastCondition("<rm_score>{reward:.1f}", 9.9, 1.0)
    texts = {bound: ["bad", "so", "good"] for bound in (-1.0, 1.0)}
    path = write_chain([8.0, 12.0] * 50, texts, condition=asdict(condition))
    found = section(path, [[8.0, 12.0], [9.0, 11.9], [7.9, 15.0]])
    assert found is not None
    assert [one["reached"] for one in found.content["policies"]["ca"]["targets"]] == pytest.approx([2 / 3, 2 / 3])
    assert "ca: 67% of the answers reach the bound 1." in found.findings
    other = section(path, [[8.0, 12.0]] * 3, judged_by_labeller=False)
    assert other is not None
    assert "reached" not in other.content["policies"]["ca"]["targets"][0]


def test_numbers_of_single_prompts() -> None:
    achieved = np.array([[0.0, 1.0, 4.0], [2.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    targets = np.array([0.0, 1.0, 2.0])
    assert slopes(achieved, targets) == pytest.approx([np.polyfit(targets, row, 1)[0] for row in achieved])
    assert rank_correlations(achieved) == pytest.approx([1.0, 0.0, -0.5])
    assert orders(achieved) == pytest.approx([1.0, 0.5, 1 / 3])
