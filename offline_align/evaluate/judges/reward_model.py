"""A reward model as the judge: it gives its raw rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import Template
from offline_align.convert.source import ModelSource, open_model
from offline_align.data.records import Message, Sample
from offline_align.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RewardModelJudge:
    """Scores each answer alone, rendered as in `label`; a judged pair shares one context."""

    checkpoint: Path
    config: EvaluateRun
    name: str = "reward model"

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return raw rewards; an empty answer is scored at its end-of-sequence token.

        Equal answers to the same prompt are scored once, so they tie exactly.
        """
        from offline_align.label.scoring import score_samples

        unique: dict[tuple[tuple[Message, ...], str, str | None], Sample] = {}
        for sample in samples:
            unique.setdefault((sample.prompt, sample.response, sample.beside), sample)
        config = self.config
        scores = score_samples(
            self.checkpoint,
            list(unique.values()),
            config.run,
            config.data,
            config.parallel,
            config.trainer,
        )
        found = dict(zip(unique, scores, strict=True))
        return [found[sample.prompt, sample.response, sample.beside] for sample in samples]

    def describe(self) -> dict[str, Any]:
        """Return kind and checkpoint."""
        return {"kind": "reward_model", "model": str(self.checkpoint)}


def reward_model_judge(config: EvaluateRun) -> RewardModelJudge:
    """Return the judge. Raises ConfigError if `judge.model` is not a reward model."""
    if config.judge.model is None:
        raise ConfigError(
            "judge.model is not set: give the run folder of `reward`, or choose judge=openai or ground_truth"
        )
    return RewardModelJudge(_folder(config.judge.model, "judge.model"), config)


def second_reward_model(config: EvaluateRun) -> RewardModelJudge | None:
    """Return the judge of `judge.second_model`, or None if it is unset.

    Raises ConfigError if it is not a reward model.
    """
    named = config.judge.second_model
    if named is None:
        return None
    return RewardModelJudge(_folder(named, "judge.second_model"), config, "second reward model")


def open_reward_model(source: str, key: str, template: Template | None = None) -> ModelSource:
    """Return the reward model that the setting `key` names.

    `template` applies if the folder does not state its own. Raises ConfigError, naming `key`, if
    the folder is not a reward model.
    """
    found = open_model(source, key, template)
    if found.kind != "reward_model":
        raise ConfigError(f"{key}={source}: is a {found.kind}; give a reward model, trained by `reward`")
    return found


def _folder(source: str, key: str) -> Path:
    folder = open_reward_model(source, key).folder
    assert folder is not None
    return folder
