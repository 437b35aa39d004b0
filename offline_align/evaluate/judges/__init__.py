"""Who scores the answers: a reward model, the demo corpus's ground truth, a served model, or people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import JudgeKind
from offline_align.data.records import Sample


class Judge(Protocol):
    """Scores answers; higher is better, and only scores of one judge can be compared."""

    @property
    def name(self) -> str:
        """What the report calls the scores."""
        ...

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return a score for each sample, in order; NaN where no verdict could be had.

        Samples with one `id` stand together and form a set. A judge that sees a set at once shows its answers in an
        order of its own, and those of sets from sample `in_order_from` on in the order given.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the report says about the judge, known once it has scored."""
        ...


def build_judge(config: EvaluateRun) -> Judge:
    """Return the judge that `judge.kind` names; raises ConfigError for what it lacks."""
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
