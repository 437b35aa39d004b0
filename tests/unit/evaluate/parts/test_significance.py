"""Paired tests and their correction against published values and under the null hypothesis."""

import numpy as np
import pytest

from offline_align.config.sections import EvaluateSection, OnBadRow
from offline_align.data.jsonl import BadRows
from offline_align.evaluate.comparison import load_comparison
from offline_align.evaluate.parts.significance import holm, signed_rank, significance_section
from offline_align.evaluate.results import Compared, Judgement
from tests.unit.evaluate.conftest import WriteRun


def test_holm_steps_down_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_equal_scores_do_not_differ() -> None:
    assert signed_rank(np.ones(5), np.ones(5)) == 1.0
    # Five differences of one sign: 2 / 2^5, exactly.
    assert signed_rank(np.linspace(1, 5, 5), np.zeros(5)) == pytest.approx(2 / 32)


def test_only_the_method_that_is_better_differs(write_run: WriteRun) -> None:
    rows = [{"id": str(k), "prompt": f"p{k}", "response": "x"} for k in range(60)]
    comparison = load_comparison([write_run(n, rows, n) for n in ("sft", "fa", "rwr")], BadRows(OnBadRow.fail, None))
    scores = np.random.default_rng(0).normal(size=(60, 1, 3)) + np.array([0.0, 1.5, 0.0])
    scores[0, 0, 0] = np.nan
    found = significance_section(Compared(comparison, Judgement("rm", scores, {})), EvaluateSection())
    assert found is not None
    differ = {tuple(one["methods"]): one["differ"] for one in found.content["tests"]}
    assert differ == {("sft", "fa"): True, ("sft", "rwr"): False, ("fa", "rwr"): True}
    assert found.findings == ["2 of 3 pairs of methods differ by more than chance at the 5% level."]
