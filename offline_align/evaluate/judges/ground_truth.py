"""The demo corpus as the judge: it knows the true quality of an answer, from 0 to 10."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroundTruthJudge:
    """Scores answers to prompts of the demo corpus."""

    name: str = "true quality"

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return true qualities in [0, 10]. Raises ConfigError for a prompt of other data."""
        from offline_align.data.demo import true_quality

        for sample in samples:
            if not is_demo_prompt(sample.prompt):
                raise ConfigError(
                    f"judge=ground_truth: prompt {sample.id} is not from the demo corpus, the only one with "
                    "a known quality; choose judge=reward_model or judge=openai"
                )
        return [float(true_quality(sample.prompt, sample.response)) for sample in samples]

    def describe(self) -> dict[str, Any]:
        """Return the kind."""
        return {"kind": "ground_truth"}


def is_demo_prompt(prompt: Sequence[Message]) -> bool:
    """Return whether a dialogue is one user message that the demo corpus could hold."""
    from offline_align.data import demo

    return len(prompt) == 1 and demo.is_demo_prompt(prompt[0].content)
