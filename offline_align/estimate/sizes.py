"""Compute parallel sizes, parameter counts, FLOPs and memory from the configuration."""

from dataclasses import dataclass, replace

from offline_align.config.sections import ModelSection, ParallelSection

# Size of one piece of logits, in fp32, if they are not kept: more targets are computed in several
# pieces. Large pieces keep a GPU busy; small pieces fit the caches of a CPU better.
LOGITS_PIECE_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
# Logits of a bin, in the model's precision, are kept for the backward pass up to this size. Larger
# ones are recomputed.
LOGITS_KEPT_BYTES = 2 * 2**30
# Memory of a rank on the CPU before it has a model: Python, torch, megatron-core and the tokenizer. Measured.
CPU_PROCESS_BYTES = 0.9 * 2**30
# What a training step on the CPU holds for each byte of activations: it expands shared keys and values to all heads,
# and the allocator of the process keeps gaps. Measured with 135 M parameters and bins of 500 to 3,000 tokens.
CPU_ACTIVATIONS = 1.4


@dataclass(frozen=True)
class ParallelSizes:
    """Parallel sizes, with `world = data * context * tensor`."""

    world: int
    tensor: int
    context: int

    @property
    def data(self) -> int:
        """Data parallel size."""
        return self.world // (self.tensor * self.context)


@dataclass(frozen=True)
class ModelSizes:
    """Widths derived from a model section, in elements."""

    hidden: int
    head_dim: int
    query_width: int
    kv_width: int
    ffn: int
    layers: int
    padded_vocab: int
    tied: bool
    scalar_head: bool = False
    """Whether the model has a scalar head, as a reward model, instead of an output layer."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer: attention, SwiGLU MLP and two norms."""
        attention = self.hidden * (2 * self.query_width + 2 * self.kv_width)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, vocabulary padding included."""
        tables = 1 if self.tied or self.scalar_head else 2
        embeddings = self.padded_vocab * self.hidden * tables
        return self.layers * self.layer_parameters + embeddings + self.hidden + self.scalar_parameters

    @property
    def scalar_parameters(self) -> int:
        """Parameters of the scalar head, which is fp32 and replicated on tensor parallel ranks."""
        return self.hidden if self.scalar_head else 0

    def rank_bytes(self, tensor: int, element: int, single: int = 4) -> float:
        """Return the bytes of all parameters on one of `tensor` ranks.

        A parameter takes `element` bytes, and one of the fp32 scalar head takes `single` bytes.
        """
        return (self.parameters - self.scalar_parameters) / tensor * element + self.scalar_parameters * single

    def train_flops(self, tokens: int, squared_lengths: int, target_tokens: int, read_tokens: int) -> float:
        """Return the floating-point operations of a training step, with causal attention.

        `tokens` is the number of computed tokens, `squared_lengths` the sum of squared segment
        lengths, `target_tokens` the tokens that reach the output layer (a scalar head counts as
        free), and `read_tokens` the tokens that go through the last layer's MLP. The backward pass
        costs twice the forward pass.
        """
        mlp = 3 * self.hidden * self.ffn
        matrices = (self.layers * (self.layer_parameters - 2 * self.hidden) - mlp) * tokens + mlp * read_tokens
        attention = self.layers * 2 * self.query_width * squared_lengths / 2
        head = 0 if self.scalar_head else self.padded_vocab * self.hidden
        return 3.0 * (2 * matrices + 2 * attention + 2 * head * target_tokens)


def model_sizes(model: ModelSection, vocab_size: int, scalar_head: bool = False) -> ModelSizes:
    """Return the sizes of `model` with `vocab_size` tokens; `scalar_head` for a reward model."""
    return ModelSizes(
        hidden=model.hidden_size,
        head_dim=model.head_width,
        query_width=model.head_width * model.num_attention_heads,
        kv_width=model.head_width * model.query_groups,
        ffn=model.ffn_hidden_size,
        layers=model.num_layers,
        padded_vocab=model.padded(vocab_size),
        tied=model.share_embeddings_and_output_weights,
        scalar_head=scalar_head,
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of one micro-batch, until its backward pass."""
    update: float
    """Copies of gradients for the optimizer, which exist only after the activations are freed."""
    process: float = 0.0
    """Of the process itself, where it shares the memory: on the CPU."""

    @property
    def total(self) -> float:
        """The peak: activations and copies for the update do not exist at the same time."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update) + self.process

    def on_cpu(self) -> "MemoryEstimate":
        """Return the memory that a process on the CPU holds for the same tensors."""
        held = self.activations * (CPU_ACTIVATIONS if self.gradients else 1)
        return replace(self, activations=held, process=CPU_PROCESS_BYTES)


def scoring_memory(
    sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes, tokens: int, bf16: bool
) -> MemoryEstimate:
    """Estimate the memory of one rank that scores bins of `tokens`: forward only, one layer at a time.

    The peak is in the MLP: the residual stream, the normed input, the output before and after the
    reduction over ranks, and gate, up, their activation and their product.
    """
    element = 2 if bf16 else 4
    split = ranks.tensor if parallel.sequence_parallel else 1
    layer = 4 * sizes.hidden / split + 4 * sizes.ffn / ranks.tensor
    return MemoryEstimate(
        weights=sizes.rank_bytes(ranks.tensor, element),
        gradients=0,
        optimizer=0,
        activations=tokens / ranks.context * layer * element,
        update=0,
    )


def checkpoint_host_bytes(sizes: ModelSizes, ranks: ParallelSizes, bf16: bool) -> float:
    """Return the host memory in bytes that one rank needs while it saves a checkpoint.

    This is a copy of what the rank writes: its data parallel share of the weights, and of main
    weights and two moments in fp32.
    """
    return sizes.parameters / ranks.tensor / (ranks.data * ranks.context) * ((2 if bf16 else 4) + 12)


def training_memory(
    sizes: ModelSizes,
    parallel: ParallelSection,
    ranks: ParallelSizes,
    tokens: int,
    bf16: bool,
    recompute: str,
    lean_optimizer: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of one training rank with `tokens` in a micro-batch.

    Bytes a parameter:

    - weights: 2 in bf16 or 4 in fp32
    - gradients: 4 with fp32 reduction or for fp32 weights, otherwise 2
    - optimizer: 12 for main weight and two moments; 8 if the weights are fp32; 6 with
      `lean_optimizer`, which has bf16 moments and only the lower 16 bits of the main weight
    - update: 4 for an fp32 copy of bf16 gradients; 0 for fp32 gradients or with `lean_optimizer`

    The distributed optimizer shards the last two over data parallel ranks. Activations are the
    tensors that a layer keeps for its backward pass: inputs and outputs of both norms, queries,
    keys and values, the attention output, and gate, up and product of a fused SwiGLU. With `full`
    recomputation they are the inputs of all layers and the activations of one layer.
    """
    shards = ranks.data * ranks.context if parallel.use_distributed_optimizer else 1
    element = 2 if bf16 else 4
    gradient = 4 if parallel.grad_reduce_in_fp32 or not bf16 else 2
    split = ranks.tensor if parallel.sequence_parallel else 1
    kept = 4 * sizes.hidden / split + (2 * sizes.query_width + 2 * sizes.kv_width + 3 * sizes.ffn) / ranks.tensor
    layers = kept * sizes.layers if recompute != "full" else sizes.hidden / split * sizes.layers + kept
    targets = 0 if sizes.scalar_head else sizes.padded_vocab / ranks.tensor * tokens / ranks.context
    # Logits are either all kept, and overwritten by their gradients, or exist one piece at a time.
    # Afterwards the gradient of the output layer is materialised for autograd.
    keeps = element * targets <= LOGITS_KEPT_BYTES
    logits = element * (targets if keeps else min(targets, LOGITS_PIECE_BYTES["cuda"] / 4))
    if targets:
        logits = max(logits, element * sizes.padded_vocab / ranks.tensor * sizes.hidden)
    activations = tokens * layers * element / ranks.context + logits
    copied = 4 if gradient == 2 and not lean_optimizer else 0
    return MemoryEstimate(
        weights=sizes.rank_bytes(ranks.tensor, element),
        gradients=sizes.rank_bytes(ranks.tensor, gradient),
        optimizer=sizes.rank_bytes(ranks.tensor, (6 if lean_optimizer else 12) if bf16 else 8, single=8) / shards,
        activations=activations,
        update=sizes.rank_bytes(ranks.tensor, copied, single=0) / shards,
    )
