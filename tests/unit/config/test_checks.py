"""Checks of settings: each problem is one line with key, value and fix."""

import math
from dataclasses import dataclass, field, replace

import pytest

from offline_align.config.checks import problems
from offline_align.config.runs import ModelRun, TrainRun
from offline_align.config.sections import GenerateSection, PolicyOptimizationMethodSection
from tests.runs import compose


def found(stage: str, *words: str, world: int = 1) -> list[str]:
    composed = compose(stage, ["run.dir=x", "model=demo", *words])
    assert composed.problems == []
    assert isinstance(composed.config, ModelRun)
    return problems(composed.config, composed.config.model, world)


def test_defaults_have_no_problem() -> None:
    assert found("sft") == []


@pytest.mark.parametrize(
    ("words", "world", "line"),
    [
        (["parallel.tensor_model_parallel_size=8"], 8, "does not divide model.num_attention_heads=4"),
        (["parallel.tensor_model_parallel_size=2"], 3, "3 ranks cannot be divided into groups of 2"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel=True"),
        (["parallel.context_parallel_size=2"], 3, "parallel.context_parallel_size=2: 3 ranks"),
        (["trainer.global_batch_size=6"], 4, "use a multiple of 4"),
        (["trainer.micro_batch_size=3"], 1, "use a multiple of 3"),
        (["trainer.micro_batch_size=0"], 1, "trainer.micro_batch_size=0: must be 1 or more"),
        (["trainer.max_steps=0"], 1, "trainer.max_steps=0"),
        (["trainer.max_time=soon"], 1, "trainer.max_time=soon"),
        (["optim.lr=0"], 1, "optim.lr=0.0: must be above 0"),
        (["optim.lr=nan"], 1, "optim.lr=nan: must be a finite number"),
        (["optim.min_lr=1"], 1, "must not exceed optim.lr"),
        (["optim.adam_beta1=1"], 1, "optim.adam_beta1=1.0"),
        (["optim.clip_grad=-1"], 1, "optim.clip_grad=-1.0"),
        (["model.hidden_size=102"], 1, "not a multiple of model.num_attention_heads=4"),
        (["model.num_query_groups=3"], 1, "not a multiple of model.num_query_groups=3"),
        (["data.max_length=8192"], 1, "the model has 4096 positions"),
        (["data.max_length=1"], 1, "a row needs at least 2 tokens"),
        (["run.seed=-1"], 1, "run.seed=-1"),
        (["model.backend=transformer_engine"], 1, "model.backend=transformer_engine: "),
        (
            ["optim.use_precision_aware_optimizer=true", "parallel.use_distributed_optimizer=false"],
            1,
            "parallel.use_distributed_optimizer=False: optim.use_precision_aware_optimizer=True needs",
        ),
    ],
)
def test_each_rule(words: list[str], world: int, line: str) -> None:
    assert any(line in problem for problem in found("sft", *words, world=world))


@pytest.mark.parametrize(
    ("stage", "word", "line"),
    [
        ("rwr", "method.beta=0", "method.beta=0.0: must be a finite number above 0"),
        ("fa", "method.threshold=inf", "method.threshold=inf"),
        ("generate", "generate.n=2", "greedy answers are all the same"),
        ("generate", "generate.top_p=0", "generate.top_p=0.0"),
        ("generate", "generate.temperature=-1", "generate.temperature=-1.0"),
        ("label", "label.flush_rows=0", "label.flush_rows=0"),
    ],
)
def test_rules_of_other_stages(stage: str, word: str, line: str) -> None:
    assert any(line in problem for problem in found(stage, word))


def test_several_rules_are_reported_at_once() -> None:
    assert len(found("sft", "optim.lr=0", "trainer.global_batch_size=3", "run.seed=-1", world=2)) == 3


@dataclass(frozen=True)
class RolloutRun(TrainRun):
    generate: GenerateSection = field(default_factory=lambda: GenerateSection(temperature=1.0))
    method: PolicyOptimizationMethodSection = field(default_factory=PolicyOptimizationMethodSection)


def test_the_paper_settings_of_ppo_have_no_problem() -> None:
    assert problems(RolloutRun(), None, 1) == []


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("rollout_batch_size", 0, "must be 1 or more"),
        ("rollout_batch_size", 100, "not a multiple of trainer.global_batch_size=128"),
        ("ppo_epochs", 0, "must be 1 or more"),
        ("kl_coefficient", -0.1, "must be a finite number of at least 0"),
        ("kl_coefficient", math.nan, "must be a finite number of at least 0"),
        ("ptx_coefficient", -1.0, "must be a finite number of at least 0"),
        ("critic_warmup_iterations", -1, "must be a finite number of at least 0"),
        ("gae_lambda", 1.1, "must be a finite number from 0 to 1"),
        ("gamma", -0.1, "must be a finite number from 0 to 1"),
        ("clip", 0.0, "must be a finite number above 0 and below 1"),
        ("clip", 1.0, "must be a finite number above 0 and below 1"),
        ("value_clip", 0.0, "must be a finite number above 0"),
        ("reward_clip", math.inf, "must be a finite number above 0"),
        ("critic_lr", 0.0, "must be a finite number above 0"),
        ("max_kl", 0.0, "must be a finite number above 0"),
        ("truncation_penalty", 1.0, "must be a finite number of at most 0"),
        ("importance_cap", 0.5, "must be a finite number of at least 1"),
    ],
)
def test_bounds_of_ppo(key: str, value: float, rule: str) -> None:
    changed = replace(PolicyOptimizationMethodSection(), **{key: value})  # type: ignore[arg-type]
    lines = problems(RolloutRun(method=changed), None, 1)
    assert any(line.startswith(f"method.{key}={value}: ") and rule in line for line in lines)
