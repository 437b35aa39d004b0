"""The sections of the configuration: one default, one docstring and one unit for every key.

A default lives here and nowhere else; the YAML files under `configs/` hold named differences only.
`None` means "not set" and each docstring says what then happens. The paper is arXiv 2308.12050.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Device(StrEnum):
    """Where tensors live: `auto` takes CUDA where a device is visible."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Numbers of the forward and backward pass; main weights and reductions are fp32 in all of them.

    `fp8`, for training with Transformer Engine, has linear layers multiply in fp8 and everything else in bf16.
    """

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp8 = "fp8"


class Backend(StrEnum):
    """Layer implementation; `auto` is Transformer Engine where that is installed and CUDA is used, else `torch`."""

    auto = "auto"
    torch = "torch"
    transformer_engine = "transformer_engine"


class Recompute(StrEnum):
    """Activations computed again in the backward pass: nothing, attention only, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class OnBadRow(StrEnum):
    """`fail` stops at the first bad row; `skip` puts bad rows into `quarantine.jsonl` and goes on."""

    fail = "fail"
    skip = "skip"


class TooLong(StrEnum):
    """Rows over `data.max_length`: cut the prompt from the left, or drop the row. Both are counted."""

    truncate_prompt = "truncate_prompt"
    drop = "drop"


class Template(StrEnum):
    """How a dialogue becomes text: the paper's `User:...Assistant: ...`, or the tokenizer's chat template."""

    paper = "paper"
    chat = "chat"


class DecayStyle(StrEnum):
    """Learning-rate schedules after the warm-up, by megatron-core's names."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


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


class ConvertTo(StrEnum):
    """The form that `convert` writes."""

    megatron = "megatron"
    huggingface = "huggingface"


class LauncherKind(StrEnum):
    """Who starts the ranks: this machine, or Slurm on the nodes that it gives to the job."""

    local = "local"
    slurm = "slurm"


class GpuKind(StrEnum):
    """GPUs of DGX nodes, for plans."""

    a100_40gb = "a100_40gb"
    a100_80gb = "a100_80gb"
    h100_80gb = "h100_80gb"
    h200_141gb = "h200_141gb"


@dataclass(frozen=True)
class RunSection:
    """Where a run lives and what makes it repeatable."""

    dir: str = MISSING
    """Folder that receives everything the stage writes; nothing is written anywhere else."""
    seed: int = 1234
    """Seed of initialisation, data order, splits and sampling."""
    device: Device = Device.auto
    """`auto`, `cpu` or `cuda`."""


@dataclass(frozen=True)
class InitSection:
    """Where weights come from."""

    from_: str | None = None
    """Run folder, checkpoint folder or Hugging Face folder; unset: random weights (written `init.from`)."""


@dataclass(frozen=True)
class ModelSection:
    """Architecture and tokenizer: a Llama-shaped GPT (SwiGLU, RoPE, RMSNorm, no bias, no dropout).

    Ignored but checked where `init.from` names a model: the weights bring their architecture.
    """

    num_layers: int = MISSING
    """Transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU inner layer."""
    num_attention_heads: int = MISSING
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); unset: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; unset: `hidden_size / num_attention_heads`."""
    max_position_embeddings: int = 4096
    """Longest sequence in tokens (paper: 4096)."""
    vocab_size: int | None = None
    """Entries of the tokenizer; unset: read from the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this; it must be divisible by tensor parallel size."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Hugging Face's `rope_scaling` mapping (`rope_type` llama3, linear or yarn); empty: none."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of random initial weights."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the embedding (paper: untied)."""
    add_qkv_bias: bool = False
    """Bias in the query/key/value projection (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm on queries and keys (Qwen3)."""
    sliding_window: int | None = None
    """Tokens that a position may look back on (Mistral); unset: all."""
    tokenizer: str | None = None
    """SentencePiece `.model`, `tokenizer.json` or Hugging Face folder; unset: that of `init.from`."""
    backend: Backend = Backend.auto
    """`auto` (Transformer Engine where it is installed and CUDA is used), `torch` or `transformer_engine`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's TransformerConfig, checked against it."""


@dataclass(frozen=True)
class DataSection:
    """How rows are read and turned into tokens."""

    max_length: int = 4096
    """Longest row in tokens, end-of-sequence included (paper: 4096)."""
    too_long: TooLong = TooLong.truncate_prompt
    """What happens to rows over `max_length`; a response alone over it is always dropped and counted."""
    on_bad_row: OnBadRow = OnBadRow.fail
    """`fail` (exit 65 with file:line) or `skip` (quarantine file, totals)."""
    template: Template | None = None
    """`paper` or `chat`; unset: that of the model in `init.from`, else `paper`."""
    cache_dir: str | None = None
    """Folder of tokenised data, keyed by content; unset: `cache/` in `run.dir`."""
    num_workers: int | None = None
    """Processes that tokenise; unset: one per core, at most 8."""


@dataclass(frozen=True)
class TrainDataSection(DataSection):
    """Training and validation files."""

    train: Any = None
    """Path or list of paths of JSONL rows (`.gz` too)."""
    valid: Any = None
    """Path or list of paths of validation rows; unset: no validation."""


@dataclass(frozen=True)
class InputDataSection(DataSection):
    """Files to read."""

    input: Any = None
    """Path or list of paths; `prepare` also takes `hf:<name>[/<folder>][#<split>]` and `demo`."""


@dataclass(frozen=True)
class ParallelSection:
    """Layout of the ranks; data parallel is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (paper: 4, see `parallel=tp4`)."""
    sequence_parallel: bool = False
    """Split activations between tensor parallel ranks along the sequence outside the matrix products."""
    context_parallel_size: int = 1
    """Ranks that share each packed bin: for rows whose activations are too large for one GPU."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and main weights over data parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass goes on (CUDA only)."""
    overlap_param_gather: bool = True
    """Gather updated weights while the next forward pass goes on (CUDA, distributed optimizer)."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    silent_rank_seconds: float = 20.0
    """Seconds after which a rank that has died or stands still is named and all others end; long work is no silence."""


@dataclass(frozen=True)
class LimitSection:
    """What every stage that may take long can set."""

    max_time: str | None = None
    """Wall-clock limit, as `3h50m`, `HH:MM:SS` or seconds: save and exit 75 before it; unset: none."""


@dataclass(frozen=True)
class ComputeSection(LimitSection):
    """What every stage that runs a model can set."""

    precision: Precision = Precision.auto
    """`bf16`, `fp32`, or `fp8` (training only); `auto` is bf16 on CUDA (the paper's) and fp32 on CPU."""
    micro_batch_size: int = 1
    """Rows of full length in one forward pass: a packed bin holds up to `micro_batch_size * data.max_length` tokens."""


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
    """Decoupled weight decay of matrices (not of norms and biases)."""
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
class RewardMethodSection:
    """Ranking loss of the reward model (Eq. 2)."""

    use_margin: bool = True
    """Subtract a pair's `margin` column from its score difference, where it has one."""
    center_rewards_coefficient: float = 0.0
    """Weight of `(r_chosen + r_rejected)^2`, which draws rewards to mean zero; 0: off (paper)."""


@dataclass(frozen=True)
class FilteringMethodSection:
    """Filtering Alignment (Eq. 4)."""

    threshold: float = 0.0
    """Rows are kept where the normalised reward is above this (paper: 0)."""
    best_of: int | None = None
    """Of these, keep so many best answers to each prompt (best-of-n); unset: all (paper)."""


@dataclass(frozen=True)
class RewardWeightedMethodSection:
    """Reward-Weighted Regression (Eq. 5)."""

    beta: float = 5.0
    """Temperature: a row weighs `exp(reward / beta)`, scaled to mean 1 over the data (paper: 5)."""


@dataclass(frozen=True)
class ConditionalMethodSection:
    """Conditional Alignment (Eq. 6)."""

    target_reward: float = 5.0
    """Normalised reward that `generate` asks for (paper: 5.0); stored in the policy."""
    reward_format: str = "<rm_score>{reward:.1f}"
    """Text of the condition, put between the prompt and the response."""
    reward_limit: float = 9.9
    """Rewards are clipped to plus or minus this before they are written, so that the text keeps its length."""


@dataclass(frozen=True)
class LauncherSection:
    """Who starts the ranks: this machine, or a Slurm job. Keys from `job_name` on are those of the job."""

    kind: LauncherKind = LauncherKind.local
    """`local`, or `slurm`: the stage becomes a batch job. Chosen by the group, `launcher=slurm`."""
    nproc_per_node: int = 1
    """Ranks on each node; ignored under torchrun, which has started them already."""
    nodes: int = 1
    """Nodes; more than one are started by Slurm, or by torchrun on each of them."""
    gpu: GpuKind = GpuKind.h100_80gb
    """GPUs that `dry_run=true` plans for: `a100_40gb`, `a100_80gb`, `h100_80gb` or `h200_141gb`."""
    job_name: str | None = None
    """Name in the queue; unset: `offline-align-<stage>`."""
    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account that is charged; unset: the user's default."""
    time: str | None = None
    """Limit of one attempt, as `3h50m`, `HH:MM:SS` or `D-HH:MM:SS`; unset: the partition's default."""
    gpus_per_node: int | None = None
    """GPUs asked for on each node; unset: one a rank, none with `run.device=cpu`; 0: none."""
    cpus_per_task: int | None = None
    """CPU cores of each rank; unset: the cluster's default."""
    container_image: str | None = None
    """Image that pyxis and enroot run the ranks in, a `.sqsh` file or `registry#name:tag`; unset: none."""
    container_mounts: list[str] = field(default_factory=list)
    """What the container sees of the storage, each `source:target`; must cover `run.dir`, data and the work folder."""
    python: str | None = None
    """Python of the ranks; unset: the one that submits, or `python` of the image."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the ranks, as `launcher.environment.NCCL_DEBUG=INFO`."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, as `launcher.sbatch.qos=high` or `launcher.sbatch.exclusive=true`; they come last."""
    dependency: str | None = None
    """Jobs that must end well first, as `12:13`; files that they are to write need not be there yet."""
    check: bool = True
    """Check the nodes before a stage of several ranks: GPUs, network, clocks, disk and versions."""
    requeue: bool = True
    """Start again after an early stop (75) or a crash; bad data (65) and bad settings (78) never do."""
    attempts: int = 3
    """Attempts in a row that save nothing new before the job is given up."""
    signal_margin_seconds: int = 300
    """How long before the limit the ranks are told to save; Slurm may do so up to a minute earlier."""


@dataclass(frozen=True)
class PrepareSection:
    """Sources, deduplication and splits."""

    format: str | None = None
    """Form of all inputs: hh, oasst1, dolly, flan, self_instruct, sft or preference; unset: by their columns."""
    valid_fraction: float = 0.05
    """Share of prompts that goes to the validation files; no prompt is in both."""
    max_rows: int | None = None
    """Rows read from each input; unset: all."""
    demo_sft_rows: int = 6000
    """SFT rows of the demo corpus (`data.input=demo`)."""
    demo_preference_rows: int = 6000
    """Preference pairs of the demo corpus."""
    demo_prompt_rows: int = 160
    """Held-out evaluation prompts of the demo corpus (paper: 160)."""


@dataclass(frozen=True)
class TokenizerSection:
    """Training of a SentencePiece model on the prepared rows."""

    train: bool = False
    """Train a tokenizer and write `tokenizer.model`."""
    vocab_size: int = 8192
    """Entries, byte fallback included."""


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
    """`reward_model`, `ground_truth`, `openai` or `human`; chosen by the group, `judge=openai`."""
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


@dataclass(frozen=True)
class ConvertSection:
    """Change of form."""

    to: ConvertTo = ConvertTo.huggingface
    """`huggingface` or `megatron`."""
    max_shard_size: str = "5GB"
    """Largest safetensors file of a Hugging Face folder."""
    evaluation: str | None = None
    """Run folder of `evaluate` whose table goes into the model card; it must compare answers of this policy."""
    check: bool = False
    """Load what was written with transformers and compare logits or scores with ours, in fp32 (memory for both)."""
