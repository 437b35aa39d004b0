"""Pooling over seeds: trainings that differ only in the seed are one method; intervals are Student's t."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison, name_columns
from offline_align.evaluate.parts.seeds import _drawable, over_seeds, seeds_section
from offline_align.evaluate.results import Compared, Judgement
from offline_align.evaluate.tables import headline
from offline_align.lineage import write_config
from tests.runs import write_manifest
from tests.unit.evaluate.conftest import rows_for


def answered(root: Path, name: str, method: str, seed: int, **settings: Any) -> Path:
    """Write a trained policy with its settings, and its answers."""
    policy, folder = root / name, root / f"generate_{name}"
    checkpoint = policy / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    folder.mkdir()
    (checkpoint / "model.json").write_text(json.dumps([name]))
    write_config(policy, {"run": {"dir": str(policy), "seed": seed}, **settings})
    write_manifest(policy, method, name, [], [], [checkpoint], {"method": method})
    path = folder / "generations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_for(["x"] * 3)))
    write_manifest(folder, "generate", name, [], [checkpoint], [path], {"method": method})
    return path


def test_runs_that_differ_in_their_seed_alone_are_pooled(tmp_path: Path) -> None:
    files = [answered(tmp_path, f"{m}{s}", m, s, optim={"lr": 1}) for m in ("sft", "fa") for s in (1, 2)]
    columns = name_columns([*files, answered(tmp_path, "rwr", "rwr", 1)])
    assert [c.name for c in columns] == ["sft seed 1", "sft seed 2", "fa seed 1", "fa seed 2", "rwr"]
    assert [c.pool for c in columns] == ["sft", "sft", "fa", "fa", None]


def test_other_settings_are_another_method(tmp_path: Path) -> None:
    files = [answered(tmp_path, f"fa{s}", "fa", s, optim={"lr": s}) for s in (1, 2)]
    assert [(c.name, c.pool) for c in name_columns(files)] == [("generate_fa1", None), ("generate_fa2", None)]


def test_the_interval_is_over_seeds_and_differences_are_paired(tmp_path: Path) -> None:
    files = [answered(tmp_path, f"{m}{s}", m, s) for m in ("sft", "fa") for s in (1, 2, 3)]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    # Seeds shift both methods equally: the difference is certain although the scores are not.
    scores = np.broadcast_to([0.0, 2.0, 4.0, 1.0, 3.0, 5.1], (3, 1, 6)).astype(float)
    found = seeds_section(Compared(comparison, Judgement("rm", scores, {})), EvaluateSection())
    assert found is not None
    fa = found.content["methods"]["fa"]
    assert fa["seeds"] == [1, 2, 3]
    assert fa["difference"]["mean"] == pytest.approx(3.1 / 3)
    assert fa["difference"]["low"] > 0.8
    assert fa["score"]["low"] < 0
    assert found.findings[0].startswith("fa against sft over 3 seeds: 1.03 [")
    assert headline({"methods": []}, [found]) == "fa scores highest over seeds, 1.03 above sft."


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        # FA is better with one seed and worse with the other.
        ([0.0, 2.0, 1.0, 1.5], "fa scores highest over seeds, 0.25 above sft, which the choice of seed could explain."),
        ([1.0, 2.0, 0.0, 1.5], "No method scores above the baseline, sft, over seeds."),
    ],
)
def test_the_headline_is_of_methods_where_seeds_are_known(tmp_path: Path, scores: list[float], said: str) -> None:
    files = [answered(tmp_path, f"{m}{s}", m, s) for m in ("sft", "fa") for s in (1, 2)]
    comparison = load_comparison(files, BadRows(OnBadRow.fail, None))
    judged = Judgement("rm", np.broadcast_to(scores, (3, 1, 4)).astype(float), {})
    found = seeds_section(Compared(comparison, judged), EvaluateSection())
    assert found is not None
    assert headline({"methods": []}, [found]) == said


def test_an_interval_that_ends_at_zero_is_drawn_to_zero() -> None:
    assert _drawable({"mean": -1.0, "low": -2.0, "high": 0.0}) == {"mean": -1.0, "low": -2.0, "high": 0.0}


def test_interval_of_the_textbook() -> None:
    found = over_seeds(np.array([1.0, 2.0, 3.0]), 0.95)
    assert found["std"] == pytest.approx(1.0)
    assert found["high"] == pytest.approx(2 + 4.302653 / 3**0.5)
    assert over_seeds(np.array([1.0]), 0.95)["low"] is None
