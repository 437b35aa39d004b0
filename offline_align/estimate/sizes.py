"""Arithmetic of ranks, parameters and memory."""

from dataclasses import dataclass

from offline_align.config.sections import ModelSection, ParallelSection

# Logits, counted in fp32, that are in memory at once where they are not kept: longer lists of targets are computed in
# pieces. Large ones keep a GPU busy; small ones stay near the caches of a CPU.
LOGITS_PIECE_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
# Logits of a bin, in the model's precision, that are kept for the backward pass; more are computed again.
LOGITS_KEPT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class ParallelSizes:
    """How the world is divided: `world = data * context * tensor`."""

    world: int
    tensor: int
    context: int

    @property
    def data(self) -> int:
        """Data parallel ranks: what remains."""
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
    """Whether one number stands on top, as in a reward model, and no output layer over the vocabulary."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer: attention, SwiGLU and two norms."""
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
        """Parameters of the scalar head: in fp32 whatever the precision, and whole on every tensor parallel rank."""
        return self.hidden if self.scalar_head else 0

    def rank_bytes(self, tensor: int, element: int, single: int = 4) -> float:
        """Return the bytes on one of `tensor` ranks at `element` bytes a parameter, `single` for those of fp32."""
        return (self.parameters - self.scalar_parameters) / tensor * element + self.scalar_parameters * single

    def train_flops(self, tokens: int, squared_lengths: int, target_tokens: int, read_tokens: int) -> float:
        """Floating-point operations of a training step, forward and backward, attention counted causally.

        `tokens` are those computed, `squared_lengths` is the sum of the squared segment lengths, `target_tokens` are
        those that reach the output layer (a scalar head costs nothing), and `read_tokens` those that go through the
        MLP of the last layer. Backward costs twice the forward pass.
        """
        mlp = 3 * self.hidden * self.ffn
        matrices = (self.layers * (self.layer_parameters - 2 * self.hidden) - mlp) * tokens + mlp * read_tokens
        attention = self.layers * 2 * self.query_width * squared_lengths / 2
        head = 0 if self.scalar_head else self.padded_vocab * self.hidden
        return 3.0 * (2 * matrices + 2 * attention + 2 * head * target_tokens)


def model_sizes(model: ModelSection, vocab_size: int, scalar_head: bool = False) -> ModelSizes:
    """Return the widths of `model` with a tokenizer of `vocab_size` entries, with `scalar_head` as a reward model."""
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
    """Copies of gradients that the optimizer works with, when activations are gone."""

    @property
    def total(self) -> float:
        """The most at once."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)


def scoring_memory(
    sizes: ModelSizes, parallel: ParallelSection, ranks: ParallelSizes, tokens: int, bf16: bool
) -> MemoryEstimate:
    """Estimate the bytes of one rank that scores bins of `tokens`: forward alone, one layer at a time.

    The most is there in the MLP: what goes around it, its normed input, its output and that of all ranks together, and
    gate, up, their activation and product.
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
    """Return the bytes that one rank takes of its host's memory while a checkpoint is saved.

    That is a copy of what it writes: its share, among the data parallel ranks, of the weights and of main weights and
    two moments in fp32.
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
    """Estimate the bytes of one training rank with `tokens` in a micro-batch.

    Weights 2 or 4 bytes, gradients 4 (fp32 reduction) or 2, optimizer 12 (main weight and two moments; 8 where the
    weights are fp32 already; 6 with `lean_optimizer`, whose moments are bf16 and whose main weight is what bf16 lacks),
    sharded over data parallel ranks by the distributed optimizer. Gradients in bf16 are copied to fp32 for the update,
    sharded likewise, but for a lean optimizer. Activations are what the
    backward pass of a layer keeps: inputs and outputs of both norms, queries, keys and values, the attention's output,
    and gate, up and product of a fused SwiGLU. With `full` recomputation they are one input for each layer and the
    inside of one.
    """
    shards = ranks.data * ranks.context if parallel.use_distributed_optimizer else 1
    element = 2 if bf16 else 4
    gradient = 4 if parallel.grad_reduce_in_fp32 or not bf16 else 2
    split = ranks.tensor if parallel.sequence_parallel else 1
    kept = 4 * sizes.hidden / split + (2 * sizes.query_width + 2 * sizes.kv_width + 3 * sizes.ffn) / ranks.tensor
    layers = kept * sizes.layers if recompute != "full" else sizes.hidden / split * sizes.layers + kept
    targets = 0 if sizes.scalar_head else sizes.padded_vocab / ranks.tensor * tokens / ranks.context
    # All of them are kept, and become gradients in place, or a piece at a time; then comes what autograd is handed as
    # the gradient of the output layer.
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
