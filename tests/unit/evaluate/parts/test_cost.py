"""Hours of every stage behind a method, from manifests in the format of the stages."""

import json
from pathlib import Path

import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.ancestry import Ancestor
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.cost import cost_section, run_hours, stage_order
from offline_align.lineage import Manifest, read_manifest
from offline_align.lineage.files import canonical_json, text_sha256
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import WriteChain, WriteRun, rows_for


def test_hours_are_seconds_times_ranks() -> None:
    assert run_hours({"seconds": 1800.0, "ranks": 4}) == 2.0
    assert run_hours({"seconds": 3600.0}) == 1.0
    assert run_hours({"rows": 3}) is None
    assert run_hours({"seconds": 3.0, "ranks": 4, "rank_seconds": {"total": 7200.0}}) == 2.0


def test_every_stage_behind_a_method_counts_and_ppo_is_the_measure(write_chain: WriteChain) -> None:
    path: Path = write_chain([8.0, 12.0], {0.0: ["a", "b", "c"], 1.0: ["d", "e", "f"]})
    comparison = load_comparison([path], BadRows(OnBadRow.fail, None))
    found = cost_section(comparison, EvaluateSection(ppo_hours=20.0))
    assert found is not None
    assert list(found.content["methods"]) == ["ca(0.0)", "ca(1.0)"]
    one = found.content["methods"]["ca(1.0)"]
    # The policy's training: 3600 s on two ranks; the others of this chain recorded nothing.
    assert one["hours"] == {"ca": 2.0}
    assert one["share_of_ppo"] == pytest.approx(0.1)
    assert one["stages_without_time"] == ["reward", "label", "generate"]
    assert one["stages_recorded_in_part"] == ["ca"]
    assert any(line.startswith("ca: recorded by an earlier version") for line in found.findings)
    assert found.tables[0].header == ["hours", "ca", "total", "of PPO"]
    assert any("generate, label, reward" in line for line in found.findings)


def ancestor(stage: str, depth: int) -> Ancestor:
    return Ancestor(Path(stage), stage, "", (), depth, Manifest(stage, "", "", {}, [], [], [], {}))


def test_stages_are_ordered_by_their_greatest_depth_in_the_lineage() -> None:
    short = [("b_data", 0), ("sft", 1), ("generate", 2)]
    long = [("b_data", 0), ("sft", 1), ("z_reward", 2), ("a_toy", 4), ("generate", 5)]
    other = [("b_data", 0), ("sft", 1), ("a_late", 4), ("generate", 5)]
    runs = [ancestor(stage, depth) for stage, depth in [*short, *long, *other]]
    assert stage_order(runs) == ["b_data", "sft", "z_reward", "a_toy", "a_late", "generate"]
    assert stage_order(runs[::-1])[3:5] == ["a_late", "a_toy"]


def test_columns_of_the_table_follow_the_lineage(write_chain: WriteChain) -> None:
    path: Path = write_chain([8.0, 12.0], {0.0: ["a", "b", "c"], 1.0: ["d", "e", "f"]})
    for manifest in path.parents[1].glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["sha256"]
        content["extra"]["rank_seconds"] = {"total": 3600.0}
        sealed = {**content, "sha256": text_sha256(canonical_json(content))}
        manifest.write_text(json.dumps(sealed))
    section = cost_section(load_comparison([path], BadRows(OnBadRow.fail, None)), EvaluateSection())
    assert section is not None
    assert section.tables[0].header == ["hours", "reward", "label", "ca", "generate", "total"]
    assert list(section.content["methods"]["ca(0.0)"]["hours"]) == ["reward", "label", "ca", "generate"]


def test_answers_without_runs_have_no_cost(write_run: WriteRun) -> None:
    comparison = load_comparison([write_run("a", rows_for(["x"] * 3))], BadRows(OnBadRow.fail, None))
    assert cost_section(comparison, EvaluateSection()) is None


def test_a_method_whose_runs_recorded_no_time_did_not_cost_nothing(
    write_chain: WriteChain, write_run: WriteRun
) -> None:
    asked = write_chain([8.0, 12.0], {0.0: ["a", "b", "c"], 1.0: ["d", "e", "f"]})
    files = [write_run("sft", rows_for(["x"] * 3), "sft"), asked]
    found = cost_section(load_comparison(files, BadRows(OnBadRow.fail, None)), EvaluateSection(ppo_hours=20.0))
    assert found is not None
    assert found.content["methods"]["sft"]["total_hours"] is None
    assert found.tables[0].rows[0] == ["sft", "", "unknown", "unknown"]
    assert not any(line.startswith("sft:") for line in found.findings)


def test_whole_commands_are_shown_with_their_parts(write_chain: WriteChain) -> None:
    path: Path = write_chain([8.0, 12.0], {0.0: ["a", "b", "c"], 1.0: ["d", "e", "f"]})
    for manifest in path.parents[1].glob("*/manifest.json"):
        found = read_manifest(manifest.parent)
        if found is not None and found.stage == "ca":
            parts = {"rank_seconds": {"total": 9000.0, "start": 1800.0, "steps": 7200.0}}
            write_manifest(manifest.parent, "ca", found.key, [], [], [], found.extra | parts)
    section = cost_section(load_comparison([path], BadRows(OnBadRow.fail, None)), EvaluateSection())
    assert section is not None
    one = section.content["methods"]["ca(1.0)"]
    assert one["hours"] == {"ca": 2.5}
    assert one["hours_by_part"] == {"start": 0.5, "steps": 2.0}
    assert one["stages_recorded_in_part"] == []
    assert section.tables[1].rows[0] == ["ca(0.0)", "0.5", "2"]
    assert not any("earlier version" in line for line in section.findings)
