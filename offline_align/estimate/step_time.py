"""Estimate step time from compute, tensor and data parallel communication, and the optimizer.

This is a cost model without torch or a GPU, not a measurement. It assumes that a run attains three
fixed shares of published peaks. `tests/unit/estimate/test_step_time.py` checks them against
published runs and against steps measured on one H100.
"""

from dataclasses import dataclass, replace

from offline_align.config.sections import ParallelSection
from offline_align.estimate.hardware import Node
from offline_align.estimate.sizes import ModelSizes, ParallelSizes, training_memory

# Share of the bf16 peak that the matrix products of large models attain, attention included.
COMPUTE_SHARE = 0.60
# Share of the rate of a large matrix product that an fp32 step on the CPU attains. Measured with 135 M parameters.
CPU_SHARE = 0.6
# Share of a link's one-directional rate that NCCL's ring collectives attain on large messages.
LINK_SHARE = 0.80
# Share of the memory bandwidth that a fused optimizer attains.
MEMORY_SHARE = 0.70
# Share of the memory that a plan may use; the allocator, NCCL and CUDA need the rest.
_USABLE_MEMORY = 0.90
# Bytes that an update moves for each parameter. AdamW reads main weight, two moments and gradient
# in fp32, and writes three of them. Before it, the gradient is zeroed and copied to fp32 once a
# step, its norm is computed, and it is scaled. After it, the weight is rounded to bf16.
_OPTIMIZER_BYTES = (4 * 4 + 3 * 4) + (2 + 6 + 4 + 8) + 6
# All-reduces of a layer's activations in a forward and backward pass.
_TENSOR_COLLECTIVES = 4


@dataclass(frozen=True)
class Work:
    """Tokens of one optimizer step, over all ranks."""

    tokens: int
    squared_lengths: int
    """Sum of squared row lengths, which determines the cost of attention."""
    targets: int
    """Tokens that reach the output layer; 0 for a reward model."""
    micro_batch_tokens: int
    """Tokens of one bin on one rank."""
    lean_optimizer: bool = False
    """Whether the optimizer keeps its moments in bf16."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    tensor_communication: float
    data_communication: float
    """Only the part that the backward pass and the next forward pass do not hide."""
    optimizer: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.compute + self.tensor_communication + self.data_communication + self.optimizer


@dataclass(frozen=True)
class Layout:
    """A parallel layout with its memory and step time."""

    parallel: ParallelSection
    recompute: str
    memory_bytes: float
    """On one rank."""
    fits: bool
    time: StepTime
    tokens_per_second_per_gpu: float


def step_time(
    sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes, work: Work, node: Node, recompute: str = "none"
) -> StepTime:
    """Return the estimated time of one optimizer step in bf16 on `ranks` GPUs of `node`s."""
    read = work.tokens if parallel.sequence_parallel else work.targets
    compute = sizes.train_flops(work.tokens, work.squared_lengths, work.targets, read)
    compute *= 4 / 3 if recompute == "full" else 1
    seconds = compute / (ranks.world * node.peak_flops * COMPUTE_SHARE)
    bins = max(1.0, work.tokens / (ranks.data * work.micro_batch_tokens))
    return StepTime(
        compute=seconds,
        tensor_communication=_tensor_seconds(sizes, ranks, work.tokens, read, node, recompute),
        data_communication=_exposed_data_seconds(sizes, parallel, ranks, node, seconds / bins),
        optimizer=_optimizer_seconds(sizes, parallel, ranks, node),
    )


def _tensor_seconds(
    sizes: ModelSizes, ranks: ParallelSizes, tokens: int, read: int, node: Node, recompute: str
) -> float:
    """Return the time to all-reduce bf16 activations [tokens, hidden] in or between nodes.

    Half of the last layer's collectives belong to its MLP, which processes only the `read` tokens.
    """
    t = ranks.tensor
    bandwidth = node.link_bandwidth if t <= node.gpus else node.network_bandwidth / node.gpus
    collectives = _TENSOR_COLLECTIVES + (2 if recompute == "full" else 0)
    rows = collectives * (sizes.layers * tokens - (tokens - read) / 2) / ranks.data
    return 2 * (t - 1) / t * rows * sizes.hidden * 2 / (bandwidth * LINK_SHARE)


def data_bytes(sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes) -> tuple[float, float]:
    """Return the bytes that each rank sends in a step to reduce gradients and to gather weights."""
    share = (ranks.data - 1) / ranks.data * sizes.parameters / ranks.tensor
    gradient = 4 if parallel.grad_reduce_in_fp32 else 2
    if parallel.use_distributed_optimizer:
        return share * gradient, share * 2
    return 2 * share * gradient, 0.0


def _exposed_data_seconds(
    sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes, node: Node, bin_seconds: float
) -> float:
    """Return the data parallel communication time that computation does not hide.

    With overlap, reduction hides behind the last backward pass and gathering behind the first
    forward pass.
    """
    inside = ranks.world <= node.gpus
    # The tensor parallel ranks of a node are in different data parallel groups, which share its
    # network adapters.
    bandwidth = node.link_bandwidth if inside else min(node.link_bandwidth, node.network_bandwidth / ranks.tensor)
    reduce, gather = (b / (bandwidth * LINK_SHARE) for b in data_bytes(sizes, parallel, ranks))
    hidden_reduce = bin_seconds * 2 / 3 if parallel.overlap_grad_reduce else 0.0
    hidden_gather = bin_seconds / 3 if parallel.overlap_param_gather else 0.0
    return max(0.0, reduce - hidden_reduce) + max(0.0, gather - hidden_gather)


def _optimizer_seconds(sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes, node: Node) -> float:
    shards = ranks.tensor * (ranks.data if parallel.use_distributed_optimizer else 1)
    return sizes.parameters / shards * _OPTIMIZER_BYTES / (node.memory_bandwidth * MEMORY_SHARE)


def label_seconds(sizes: ModelSizes, tokens: int, squared_lengths: int, gpus: int, node: Node) -> float:
    """Return the seconds to score `tokens` on `gpus` GPUs: forward only, no output layer."""
    forward = sizes.train_flops(tokens, squared_lengths, 0, 0) / 3
    return forward / (gpus * node.peak_flops * COMPUTE_SHARE)


def layout(sizes: ModelSizes, parallel: ParallelSection, recompute: str, world: int, work: Work, node: Node) -> Layout:
    """Return the memory and step time of one parallel layout of `world` GPUs."""
    ranks = ParallelSizes(world, parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    memory = training_memory(
        sizes, parallel, ranks, work.micro_batch_tokens, True, recompute, work.lean_optimizer
    ).total
    time = step_time(sizes, parallel, ranks, work, node, recompute)
    fits = memory <= _USABLE_MEMORY * node.memory_bytes
    return Layout(parallel, recompute, memory, fits, time, work.tokens / time.total / world)


def fastest_layout(
    sizes: ModelSizes, parallel: ParallelSection, recompute: str, world: int, work: Work, node: Node, groups: int
) -> Layout | None:
    """Return the fastest layout that fits into memory, or None if none does.

    The candidates are tensor parallel sizes that divide the key/value `groups` and fit into a node
    (with sequence parallelism), gradients reduced as configured or in bf16, and activations
    recomputed as configured or fully.
    """
    widths = [t for t in (1, 2, 4, 8) if t <= node.gpus and world % t == 0 and groups % t == 0]
    candidates = [
        layout(sizes, _with(parallel, width, fp32), how, world, work, node)
        for width in widths
        for fp32 in sorted({parallel.grad_reduce_in_fp32, False}, reverse=True)
        for how in dict.fromkeys((recompute, "full"))
    ]
    fitting = [c for c in candidates if c.fits]
    # Among equally fast layouts, min() returns the first, which changes the configuration least.
    return min(fitting, key=lambda c: c.time.total) if fitting else None


def _with(parallel: ParallelSection, tensor: int, fp32_gradients: bool) -> ParallelSection:
    return replace(
        parallel,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        context_parallel_size=1,
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=fp32_gradients,
    )
