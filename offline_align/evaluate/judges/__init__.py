"""Judges: a reward model, the demo corpus's ground truth, a served model, or people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import JudgeKind
from offline_align.data.records import Sample


class Judge(Protocol):
    """Scores answers; higher is better. Scores of different judges cannot be compared."""

    @property
    def name(self) -> str:
        """The name of the scores in the report."""
        ...

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return a score for each sample, in order; NaN if there is no verdict.

        Consecutive samples with the same `id` form a set. A judge that sees a whole set shuffles
        its answers, except in the sets from sample `in_order_from` on.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return the report's entry about the judge; call it after `score`."""
        ...


def build_judge(config: EvaluateRun) -> Judge:
    """Return the judge of `judge.kind`. Raises ConfigError if its settings are incomplete."""
    kind = config.judge.kind
    run_dir = Path(config.run.dir)
    if kind is JudgeKind.reward_model:
        from offline_align.evaluate.judges.reward_model import reward_model_judge

        return reward_model_judge(config)
    if kind is JudgeKind.ground_truth:
        from offline_align.evaluate.judges.ground_truth import GroundTruthJudge

        return GroundTruthJudge()
    if kind is JudgeKind.openai:
        from offline_align.evaluate.judges.served_model import served_model_judge

        return served_model_judge(config.judge, run_dir, config.run.seed)
    if kind is JudgeKind.human:
        from offline_align.evaluate.judges.human import HumanJudge

        return HumanJudge(run_dir, config.run.seed)
    assert_never(kind)
