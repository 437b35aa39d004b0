"""How answers are scored, made, judged and reported."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Engine(StrEnum):
    """Generation engines: `auto` takes vLLM where it is installed and CUDA is used."""

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
    """What a served judge sees at once: all answers to a prompt (the paper's), two of them, or one."""

    set = "set"
    pair = "pair"
    single = "single"


@dataclass(frozen=True)
class LabelSection:
    """Reward labelling."""

    flush_rows: int = 256
    """Scored rows between two writes of a rank's journal: the most that a crash can cost it."""
    histogram_bins: int = 60
    """Bars of the reward histogram (Figure 3)."""
    certificate_fraction: float = 0.005
    """Share of the rows scored a second time, alone and with the model loaded afresh (`certificate.json`); 0: none."""


@dataclass(frozen=True)
class GenerateSection:
    """Sampling of responses."""

    engine: Engine = Engine.auto
    """`auto`, `transformers` or `vllm`."""
    max_new_tokens: int = 1024
    """Longest response in tokens."""
    temperature: float = 0.0
    """0: greedy (paper)."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this probability."""
    n: int = 1
    """Responses to each prompt (best-of-n needs temperature > 0)."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response, removed from it."""
    batch_size: int = 32
    """Prompts generated together on one rank (transformers engine)."""


@dataclass(frozen=True)
class GenerateMethodSection:
    """The condition given to a Conditional Alignment policy."""

    target_reward: Any = None
    """Normalised reward asked for, or a list of them, each asked of every prompt; unset: that stored in the policy."""


@dataclass(frozen=True)
class JudgeSection:
    """Who scores the answers in `evaluate`."""

    kind: JudgeKind = JudgeKind.reward_model
    """`reward_model`, `ground_truth`, `openai` or `human`; chosen by the group, as
    `judge=openai judge.model=NAME judge.base_url=http://localhost:8000/v1`."""
    model: str | None = None
    """Reward-model run folder, or the served model's name."""
    base_url: str | None = None
    """OpenAI-compatible endpoint; the key comes from OPENAI_API_KEY."""
    form: JudgeForm = JudgeForm.set
    """What a served judge sees at once: `set` (the paper's), `pair` or `single`."""
    concurrent_requests: int = 8
    """Requests to the endpoint at a time."""
    retries: int = 6
    """Attempts after a failed request, each after twice the time of the one before."""
    timeout_seconds: float = 120.0
    """Longest wait for one reply."""
    prompt_token_price: float = 0.0
    """Price of a million tokens sent, for the report's cost."""
    completion_token_price: float = 0.0
    """Price of a million tokens received."""
    calibration: Any = None
    """Pairs that people have judged (verdict rows or preference rows), path or list: how far to trust the judge."""
    second_model: str | None = None
    """Run folder of another reward model, best of other training pairs: does it see the same gains?"""


@dataclass(frozen=True)
class EvaluateSection:
    """Comparison of several generation files."""

    bootstrap_samples: int = 2000
    """Resamples of each confidence interval."""
    confidence: float = 0.95
    """Level of the intervals."""
    baseline: str | None = None
    """Name of the method that win rates are counted against; unset: `sft` where present, else the first."""
    group_by: str = "benchmark"
    """Column that splits the tables (the paper's vicuna and mt_bench), where rows have it."""
    ppo_hours: float | None = None
    """GPU hours of a PPO run that the cost of each method is compared with (the paper's Table 3)."""
    divergence: bool = True
    """Measure how far policies are from the baseline's (each is loaded once); only where a reward model is run too."""
    runs: Any = None
    """Run folders, or folders of them, that the page is to show; alone they need neither answers nor a judge."""
