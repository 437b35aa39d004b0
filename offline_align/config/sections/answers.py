"""Sections for labelling, generation and evaluation."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Engine(StrEnum):
    """Generation engines. `auto` selects vLLM if it is installed and the run uses CUDA."""

    auto = "auto"
    transformers = "transformers"
    vllm = "vllm"


class JudgeKind(StrEnum):
    """Who scores the answers."""

    reward_model = "reward_model"
    ground_truth = "ground_truth"
    openai = "openai"
    human = "human"


class JudgeForm(StrEnum):
    """What one request to a served judge holds: all answers to a prompt (paper), two, or one."""

    set = "set"
    pair = "pair"
    single = "single"


@dataclass(frozen=True)
class LabelSection:
    """Reward labelling."""

    flush_rows: int = 256
    """Rows that a rank scores between two writes to its journal. A crash loses at most this
    many."""
    histogram_bins: int = 60
    """Number of bins in the reward histogram (Figure 3)."""
    certificate_fraction: float = 0.005
    """Fraction of the rows to score a second time, each alone and with a freshly loaded model. The
    result is `certificate.json`. 0 disables the check."""
    best_of: int | None = None
    """Also write the answers with the highest rewards, this many for each prompt, to `best.jsonl`. It
    has the form of `generations.jsonl`, so `evaluate` compares best-of-n with other methods. The input
    must be answers of `generate`."""
    statistics: str | None = None
    """Run folder of an earlier `label` with the same reward model, or its `reward_stats.json`. Rewards
    are normalised with the mean and standard deviation of that run, so both runs have one scale:
    validation rows, new answers, rounds. If unset, those of this run's own rewards."""


@dataclass(frozen=True)
class GenerateSection:
    """Sampling of responses."""

    engine: Engine = Engine.auto
    """Generation engine. `auto` selects vLLM if it is installed and the run uses CUDA, else
    transformers."""
    max_new_tokens: int = 1024
    """Maximum length of a response, in tokens."""
    temperature: float = 0.0
    """Sampling temperature. 0 is greedy decoding (paper)."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens whose total probability reaches this
    value. 1 keeps all tokens."""
    n: int = 1
    """Responses per prompt. More than one (best-of-n) needs a temperature above 0."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response. They are removed from it."""
    batch_size: int = 32
    """Prompts per batch on one rank (transformers engine only)."""


@dataclass(frozen=True)
class GenerateMethodSection:
    """The condition for a Conditional Alignment policy."""

    target_reward: Any = field(default=None, metadata={"kind": "number or list"})
    """Normalised reward to ask a Conditional Alignment policy for; of a policy that was trained with
    quantiles, the number of one. With a list, every prompt is answered once per target. If unset, the
    target stored with the policy."""


@dataclass(frozen=True)
class JudgeSection:
    """Who scores the answers in `evaluate`."""

    kind: JudgeKind = JudgeKind.reward_model
    """Who scores the answers. Choose it with the group, for example `judge=openai judge.model=NAME
    judge.base_url=http://localhost:8000/v1`."""
    model: str | None = None
    """Run folder of the reward model, or the name of the served model."""
    base_url: str | None = None
    """URL of an OpenAI-compatible endpoint. The API key is read from OPENAI_API_KEY."""
    form: JudgeForm = JudgeForm.set
    """What one request to a served judge holds: all answers to a prompt (`set`, paper), two of them
    (`pair`), or one (`single`)."""
    concurrent_requests: int = 8
    """Maximum number of concurrent requests to the endpoint."""
    retries: int = 6
    """Retries of a failed request, with exponential backoff."""
    timeout_seconds: float = 120.0
    """Maximum wait for one response of the endpoint."""
    prompt_token_price: float = 0.0
    """Price of a million prompt tokens, for the cost in the report."""
    completion_token_price: float = 0.0
    """Price of a million completion tokens, for the cost in the report."""
    calibration: Any = None
    """Pairs judged by people (verdict rows or preference rows), as a path or list of paths. The
    report compares the judge with them."""
    second_model: str | None = None
    """Run folder of a second reward model, preferably trained on other pairs. The report checks
    whether it confirms the gains."""


@dataclass(frozen=True)
class EvaluateSection:
    """Comparison of several generation files."""

    bootstrap_samples: int = 2000
    """Bootstrap resamples per confidence interval."""
    confidence: float = 0.95
    """Level of the confidence intervals."""
    baseline: str | None = None
    """Name of the method that win rates compare with. If unset, `sft` if it is among the methods,
    else the first one."""
    group_by: str = "benchmark"
    """Column that splits the tables by benchmark (in the paper vicuna and mt_bench). Ignored if the
    rows lack it."""
    ppo_hours: float | None = None
    """GPU hours of a PPO run to compare the cost of each method with (Table 3 of the paper)."""
    divergence: bool = True
    """Measure how far each policy is from the baseline's policy. Loads every policy once, and only
    if a reward model judges."""
    runs: Any = None
    """Run folders, or folders of run folders, to show in the report. With these alone, `evaluate`
    needs neither answers nor a judge."""
