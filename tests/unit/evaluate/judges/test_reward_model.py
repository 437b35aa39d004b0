"""The reward-model judge scores equal answers once, so they tie."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offline_align.config.runs import EvaluateRun
from offline_align.config.sections import ComputeSection, JudgeSection, ModelSection, Precision, Template
from offline_align.data.demo import demo_tokenizer_path
from offline_align.data.records import Message, Sample
from offline_align.data.tokenizer import load_tokenizer
from offline_align.errors import ConfigError
from offline_align.evaluate.judges.reward_model import reward_model_judge
from offline_align.label import scoring
from offline_align.model.description import ModelDescription


def save_description(folder: Path, kind: Any) -> Path:
    folder.mkdir()
    tokenizer = load_tokenizer(demo_tokenizer_path())
    tokenizer.save(folder / "tokenizer")
    size = tokenizer.vocab_size
    model = ModelSection(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=size)
    ModelDescription(kind, model, Template.paper, tokenizer.content_hash).save(folder)
    return folder


def make_config(model: str | None, precision: Precision = Precision.auto) -> EvaluateRun:
    return EvaluateRun(judge=JudgeSection(model=model), trainer=ComputeSection(precision=precision))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the model by the number of letters, and record the scored samples of each call."""
    asked: list[list[str]] = []

    def score(checkpoint: Path, samples: Sequence[Sample], *sections: Any) -> list[float]:
        asked.append([*(sample.response for sample in samples), sections[-1].precision])
        return [float(len(sample.response)) + len(asked) for sample in samples]

    monkeypatch.setattr(scoring, "score_samples", score)
    return asked


def make_samples(*answers: str, question: str = "Why?") -> list[Sample]:
    return [Sample("p", (Message("user", question),), answer, {}) for answer in answers]


def test_equal_answers_are_scored_once(tmp_path: Path, asked: list[list[str]]) -> None:
    judge = reward_model_judge(make_config(str(save_description(tmp_path / "rm", "reward_model"))))
    scores = judge.score([*make_samples("no", "", "no", "", "yes"), *make_samples("no", question="How?")])
    assert scores == [3.0, 1.0, 3.0, 1.0, 4.0, 3.0]
    assert asked == [["no", "", "yes", "no", "auto"]]


def test_an_answer_is_scored_again_where_another_one_shares_its_context(tmp_path: Path, asked: list[list[str]]) -> None:
    judge = reward_model_judge(make_config(str(save_description(tmp_path / "rm", "reward_model"))))
    (alone,) = make_samples("no")
    of_a_pair = replace(alone, beside="a longer answer, for which more of the prompt is cut")
    judge.score([alone, of_a_pair, alone, of_a_pair])
    assert asked == [["no", "no", "auto"]]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_the_precision_asked_for_is_used(tmp_path: Path, asked: list[list[str]], precision: str) -> None:
    folder = save_description(tmp_path / "rm", "reward_model")
    reward_model_judge(make_config(str(folder), Precision(precision))).score(make_samples("no"))
    assert asked[0][-1] == precision


def test_a_policy_is_no_judge(tmp_path: Path) -> None:
    folder = save_description(tmp_path / "policy", "policy")
    with pytest.raises(ConfigError, match=r"judge\.model=.*policy: is a policy"):
        reward_model_judge(make_config(str(folder)))
    with pytest.raises(ConfigError, match=r"judge\.model=.*absent: no such folder"):
        reward_model_judge(make_config(str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"judge\.model is not set"):
        reward_model_judge(make_config(None))


def test_the_checkpoint_is_described(tmp_path: Path) -> None:
    folder = save_description(tmp_path / "rm", "reward_model")
    judge = reward_model_judge(make_config(str(folder)))
    assert judge.describe() == {"kind": "reward_model", "model": str(folder)}
    assert judge.name == "reward model"
