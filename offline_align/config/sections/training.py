"""Sections for precision, batches, training length, the optimizer and the methods."""

from dataclasses import dataclass, field, replace
from enum import StrEnum

from offline_align.config.sections.execution import LimitSection


class Precision(StrEnum):
    """Precision of the forward and backward pass.

    Main weights and reductions are fp32 in all of them. `fp8` (training with Transformer Engine only)
    multiplies in fp8 in the linear layers and computes everything else in bf16.
    """

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"

    def in_bf16(self, on_cuda: bool) -> bool:
        """Return whether the forward pass runs in bf16, either by choice or by default on CUDA.

        True for `fp8` as well, whose other operations run in bf16.
        """
        return on_cuda if self is Precision.auto else self is not Precision.fp32


class Recompute(StrEnum):
    """Activations to recompute in the backward pass: none, those of attention, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class DecayStyle(StrEnum):
    """Learning-rate schedules after the warm-up, named as in megatron-core."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class ConditionKind(StrEnum):
    """What the text before a response states in Conditional Alignment."""

    value = "value"
    quantile = "quantile"
    at_least = "at_least"


PAPER_TARGET = 5.0
"""The reward that the paper asks a policy for, in standard deviations above the mean."""


class PreferenceLoss(StrEnum):
    """Losses of `dpo` on a pair."""

    sigmoid = "sigmoid"
    ipo = "ipo"


class PairsOf(StrEnum):
    """Which pairs to make of the labelled or ranked answers to one prompt."""

    best_worst = "best_worst"
    all = "all"


@dataclass(frozen=True)
class ComputeSection(LimitSection):
    """Settings of every stage that runs a model."""

    precision: Precision = Precision.auto
    """Precision of the forward and backward pass. `auto` is bf16 on CUDA (paper) and fp32 on the
    CPU. `fp8` is for training only and needs Transformer Engine."""
    micro_batch_size: int = 1
    """Full-length rows per forward pass. Rows are packed into bins of up to `micro_batch_size *
    data.max_length` tokens."""
    share_prompts: bool = True
    """Compute a prompt once for all its answers in a step or in a scoring pass, for example for
    both answers of a pair."""


@dataclass(frozen=True)
class TrainerSection(ComputeSection):
    """Batch size, length of the run, and when to log, validate and save."""

    global_batch_size: int = 128
    """Rows per optimizer step, summed over all ranks (paper: 128)."""
    max_epochs: int = 1
    """Passes over the data (paper: 1 for the reward model). Ignored if `max_steps` is set."""
    max_steps: int | None = None
    """Number of optimizer steps. If unset, `max_epochs` decides."""
    log_interval: int = 1
    """Steps between two lines of `metrics.jsonl`."""
    eval_interval: int | None = None
    """Steps between two validations. If unset, validate only at the end."""
    save_interval: int | None = 500
    """Steps between two checkpoints. If `null`, save only at the end."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, in addition to the one with the lowest validation
    loss."""
    async_save: bool = False
    """Write checkpoints in a background thread while training continues. Each rank needs CPU memory
    for a copy of its shards."""
    recompute: Recompute = Recompute.none
    """Activations to recompute in the backward pass: `none`, `selective` (attention) or `full`
    (whole layers)."""
    wandb_project: str | None = None
    """Weights & Biases project to log the metrics to as well. The API key is read from
    WANDB_API_KEY. If unset, nothing is sent."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last optimizer step to profile, as `[5,7]`. Writes a trace to `profile/`, or marks
    the range if `nsys` profiles the run."""


@dataclass(frozen=True)
class OptimSection:
    """AdamW and its learning-rate schedule, with the names of megatron-core."""

    lr: float = 5e-6
    """Peak learning rate (paper: 5e-6; reward model 9e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = DecayStyle.cosine
    """Learning-rate schedule after the warm-up."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Steps until the learning rate reaches `min_lr`. If unset, the length of the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay. It applies to matrices only, not to norms, biases or other
    vectors."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.98
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Constant added to the denominator of the update."""
    clip_grad: float = 1.0
    """Maximum global gradient norm. 0 disables clipping."""
    use_precision_aware_optimizer: bool = False
    """Store the moments in bf16, and only those 16 bits of each fp32 main weight that its bf16
    weight lacks. This halves the optimizer memory and needs Transformer Engine."""


@dataclass(frozen=True)
class MethodSection:
    """Settings of a training method."""


@dataclass(frozen=True)
class RewardMethodSection(MethodSection):
    """Ranking loss of the reward model (Eq. 2)."""

    use_margin: bool = True
    """Subtract the `margin` column from the score difference of a pair, if the pair has one."""
    center_rewards_coefficient: float = 0.0
    """Weight of the penalty `(r_chosen + r_rejected)^2`, which centers the rewards at zero. 0
    disables it (paper)."""


@dataclass(frozen=True)
class FilteringMethodSection(MethodSection):
    """Filtering Alignment (Eq. 4)."""

    threshold: float = 0.0
    """Keep the rows whose normalised reward is strictly above this (paper: 0)."""
    best_of: int | None = None
    """Of these rows, keep only this many with the highest rewards per prompt (best-of-n). If unset,
    keep all (paper)."""


@dataclass(frozen=True)
class RewardWeightedMethodSection(MethodSection):
    """Reward-Weighted Regression (Eq. 5)."""

    beta: float = 5.0
    """Temperature. The weight of a row is `exp(reward / beta)`, scaled to mean 1 over the data
    (paper: 5). `ca` uses it with `method.weight_by_reward`."""


@dataclass(frozen=True)
class ConditionalMethodSection(RewardWeightedMethodSection):
    """Conditional Alignment (Eq. 6)."""

    condition: ConditionKind = ConditionKind.value
    """What the text before a response states: its reward (`value`, paper), the number of the quantile
    in which its reward lies (`quantile`), or a bound that its reward reaches (`at_least`)."""
    target_reward: float | None = None
    """Normalised reward that `generate` asks for by default, or with `method.condition=quantile` the
    number of a quantile. If unset, 5.0 (paper), or the highest quantile. It is stored with the policy."""
    reward_format: str = "<rm_score>{reward:.1f}"
    """Format of the condition text, which stands between the prompt and the response."""
    reward_limit: float = 9.9
    """Rewards are clipped to plus or minus this value in the condition text, so that its length
    stays the same."""
    quantiles: int = 5
    """Number of quantiles for `method.condition=quantile`. Each has about equally many
    training rows (Lu et al. 2022)."""
    quantile_format: str = "<rm_score>{quantile}"
    """Format of the condition text for `method.condition=quantile`."""
    bounds: int = 1
    """Number of bounds for each row with `method.condition=at_least`. An epoch has one copy of the row
    for each."""
    weight_by_reward: bool = False
    """Weight rows by `exp(reward / method.beta)` as well, as `rwr` does (Wang et al. 2023)."""

    @property
    def target(self) -> float | None:
        """The target; None for the highest quantile."""
        if self.target_reward is None and self.condition is not ConditionKind.quantile:
            return PAPER_TARGET
        return self.target_reward

    def settled(self) -> "ConditionalMethodSection":
        """Return the section with the target that an unset one stands for, if the settings alone decide it."""
        return replace(self, target_reward=self.target)


@dataclass(frozen=True)
class PairsMethodSection(MethodSection):
    """Pairs of labelled answers."""

    pairs: PairsOf = PairsOf.best_worst
    """Pairs to make of the labelled answers to one prompt: `best_worst` (the highest against the
    lowest reward) or `all`. Rows that are pairs already are used as they are."""
    min_gap: float = 0.0
    """Make only pairs whose normalised rewards differ by at least this. Equal rewards never make a
    pair."""


@dataclass(frozen=True)
class PreferenceMethodSection(PairsMethodSection):
    """Direct Preference Optimization (Rafailov et al. 2023)."""

    loss: PreferenceLoss = PreferenceLoss.sigmoid
    """`sigmoid` (DPO) or `ipo` (Azar et al. 2023). `ipo` divides log-likelihoods by the number of
    their tokens."""
    beta: float = 0.1
    """Strength of the pull to the policy at the start of the run (Rafailov et al.: 0.1)."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose labels are swapped, for `method.loss=sigmoid`. 0 trusts all."""
    sft_coefficient: float = 0.0
    """Weight of the SFT loss of the chosen answer, which is a mean over its tokens. 0 disables it."""


@dataclass(frozen=True)
class PolicyOptimizationMethodSection(MethodSection):
    """Proximal Policy Optimization (Schulman et al. 2017), with the objective of Eq. 3."""

    reward_model: str | None = None
    """Reward model that scores the answers: a run folder or a Hugging Face folder."""
    critic: str | None = None
    """Reward model or critic whose weights the critic starts from. If unset, `method.reward_model`
    (paper)."""
    rollout_batch_size: int = 1024
    """Answers per iteration (paper: 1,024). They are learned from in mini-batches of
    `trainer.global_batch_size`."""
    ppo_epochs: int = 1
    """Passes over the answers of an iteration (paper: 1)."""
    kl_coefficient: float = 0.01
    """Weight of `log pi(token) - log pi_SFT(token)`, which is subtracted from the reward of every
    token (beta of Eq. 3; paper: 0.01). The unit is normalised reward per nat."""
    gae_lambda: float = 0.95
    """Decay of the errors of later tokens in generalised advantage estimation (Schulman et al. 2016;
    paper: 0.95). 1 uses whole returns, and 0 only the value of the next token."""
    gamma: float = 1.0
    """Discount per token (paper: 1)."""
    clip: float = 0.2
    """The ratio of new to old probability of a token earns nothing beyond 1 plus or minus this."""
    value_clip: float = 0.2
    """The critic earns nothing for values further than this from those before the iteration, in
    normalised reward."""
    reward_clip: float = 10.0
    """Normalised rewards are clipped to plus or minus this value."""
    truncation_penalty: float = -1.0
    """Normalised reward that is added to an answer that reached `generate.max_new_tokens`."""
    importance_cap: float = 2.0
    """Maximum weight of a token. The weight is its probability by the trainer over that by the
    generation engine, which corrects for the difference of their numerics."""
    ptx_coefficient: float = 0.0
    """Weight of the log-likelihood of the texts in `data.ptx` (gamma of Eq. 3). 0 disables it
    (paper)."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the critic is trained."""
    critic_lr: float = 9e-6
    """Peak learning rate of the critic (paper: 9e-6). The policy has `optim.lr`."""
    max_kl: float | None = None
    """End the run if an answer's mean KL divergence from the SFT policy exceeds this, in nats. If
    unset, there is no limit."""
