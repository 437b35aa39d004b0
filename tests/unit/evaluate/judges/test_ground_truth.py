"""The ground-truth judge scores prompts of the demo corpus only."""

import pytest

from offline_align.data.demo import demo_samples
from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError
from offline_align.evaluate.judges.ground_truth import GroundTruthJudge, is_demo_prompt


def test_scores_are_the_quality_that_the_corpus_wrote_down() -> None:
    rows = list(demo_samples(40, 0, 10))
    samples = [Sample(str(k), (Message("user", r["prompt"]),), r["response"], r) for k, r in enumerate(rows)]
    expected = [row["quality"] for row in rows]
    assert len(set(expected)) > 5
    assert GroundTruthJudge().score(samples) == pytest.approx(expected, abs=1e-3)


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompt p7 is not from the demo corpus"):
        GroundTruthJudge().score([Sample("p7", (Message("user", "Why?"),), "So.", {})])


def test_a_dialogue_is_not_a_demo_prompt() -> None:
    (row,) = demo_samples(1, 0, 10)
    message = Message("user", row["prompt"])
    assert is_demo_prompt((message,))
    assert not is_demo_prompt((Message("system", "Be brief."), message))
