"""How weights are computed: precision, batches, optimizer and the methods."""

from dataclasses import dataclass, field
from enum import StrEnum

from offline_align.config.sections.execution import LimitSection


class Precision(StrEnum):
    """Numbers of the forward and backward pass; main weights and reductions are fp32 in all of them.

    `fp8`, for training with Transformer Engine, has linear layers multiply in fp8 and everything else in bf16.
    """

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"

    def in_bf16(self, on_cuda: bool) -> bool:
        """Whether the forward pass runs in bf16: asked for, or by default on CUDA."""
        return on_cuda if self is Precision.auto else self is not Precision.fp32


class Recompute(StrEnum):
    """Activations computed again in the backward pass: nothing, attention only, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class DecayStyle(StrEnum):
    """Learning-rate schedules after the warm-up, by megatron-core's names."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


@dataclass(frozen=True)
class ComputeSection(LimitSection):
    """What every stage that runs a model can set."""

    precision: Precision = Precision.auto
    """`bf16`, `fp32`, or `fp8` (training only); `auto` is bf16 on CUDA (the paper's) and fp32 on CPU."""
    micro_batch_size: int = 1
    """Rows of full length in one forward pass: a packed bin holds up to `micro_batch_size * data.max_length` tokens."""
    share_prompts: bool = True
    """Compute a prompt once for both answers of a pair, and for all answers to it that share a step or are scored."""


@dataclass(frozen=True)
class TrainerSection(ComputeSection):
    """Length of the run, batch arithmetic, and when to log, validate and save."""

    global_batch_size: int = 128
    """Rows of one optimizer step, over all ranks (paper: 128)."""
    max_epochs: int = 1
    """Passes over the data; ignored where `max_steps` is set (paper: 1 for the reward model)."""
    max_steps: int | None = None
    """Optimizer steps; unset: by `max_epochs`."""
    log_interval: int = 1
    """Steps between two lines of `metrics.jsonl`."""
    eval_interval: int | None = None
    """Steps between two validations; unset: at the end only."""
    save_interval: int | None = 500
    """Steps between two checkpoints; unset: at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best one on the validation set."""
    async_save: bool = False
    """Write checkpoints in a thread while the training goes on; takes CPU memory for a copy of each rank's shards."""
    recompute: Recompute = Recompute.none
    """`none`, `selective` (attention) or `full` (whole layers)."""
    wandb_project: str | None = None
    """Weights & Biases project that gets the metrics too; the key comes from WANDB_API_KEY. Unset: none."""
    profile_steps: list[int] = field(default_factory=list)
    """First and last optimizer step of a profile, as `[5,7]`: a trace in `profile/`, or a range for `nsys`."""


@dataclass(frozen=True)
class OptimSection:
    """AdamW and its schedule, by megatron-core's names."""

    lr: float = 5e-6
    """Peak learning rate (paper: 5e-6; reward model 9e-6)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = DecayStyle.cosine
    """`constant`, `cosine` or `linear`."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_decay_steps: int | None = None
    """Steps until `min_lr` is reached; unset: the length of the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases and all other vectors have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.98
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    use_precision_aware_optimizer: bool = False
    """Moments in bf16, and main weights as the 16 bits that bf16 weights lack: half the memory (Transformer Engine)."""


@dataclass(frozen=True)
class MethodSection:
    """The settings of a training method."""


@dataclass(frozen=True)
class RewardMethodSection(MethodSection):
    """Ranking loss of the reward model (Eq. 2)."""

    use_margin: bool = True
    """Subtract a pair's `margin` column from its score difference, where it has one."""
    center_rewards_coefficient: float = 0.0
    """Weight of `(r_chosen + r_rejected)^2`, which draws rewards to mean zero; 0: off (paper)."""


@dataclass(frozen=True)
class FilteringMethodSection(MethodSection):
    """Filtering Alignment (Eq. 4)."""

    threshold: float = 0.0
    """Rows are kept where the normalised reward is above this (paper: 0)."""
    best_of: int | None = None
    """Of these, keep so many best answers to each prompt (best-of-n); unset: all (paper)."""


@dataclass(frozen=True)
class RewardWeightedMethodSection(MethodSection):
    """Reward-Weighted Regression (Eq. 5)."""

    beta: float = 5.0
    """Temperature: a row weighs `exp(reward / beta)`, scaled to mean 1 over the data (paper: 5)."""


@dataclass(frozen=True)
class ConditionalMethodSection(MethodSection):
    """Conditional Alignment (Eq. 6)."""

    target_reward: float = 5.0
    """Normalised reward that `generate` asks for (paper: 5.0); stored in the policy."""
    reward_format: str = "<rm_score>{reward:.1f}"
    """Text of the condition, put between the prompt and the response."""
    reward_limit: float = 9.9
    """Rewards are clipped to plus or minus this before they are written, so that the text keeps its length."""
