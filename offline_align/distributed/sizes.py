"""Arithmetic of ranks, batches, parameters and memory, without torch: what `dry_run=true` prints."""

from dataclasses import dataclass

from offline_align.config.sections import ModelSection, ParallelSection

# fp32 logits, and their gradients, that are in memory at once: longer lists of targets are computed in pieces. Large
# ones keep a GPU busy; small ones stay near the caches of a CPU.
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


def padding_multiple(tensor: int, context: int, sequence_parallel: bool, fp8: bool = False) -> int:
    """Return what the tokens of a bin must be a multiple of: ranks hold equal parts, fp8 products multiples of 16."""
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1) * (16 if fp8 else 1)


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

    @property
    def layer_parameters(self) -> int:
        """Parameters of one transformer layer: attention, SwiGLU and two norms."""
        attention = self.hidden * (2 * self.query_width + 2 * self.kv_width)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole policy, vocabulary padding included."""
        embeddings = self.padded_vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def train_flops(self, tokens: int, squared_lengths: int, target_tokens: int, read_tokens: int) -> float:
        """Floating-point operations of a training step, forward and backward, attention counted causally.

        `tokens` are those computed, `squared_lengths` is the sum of the squared segment lengths, `target_tokens` are
        those that reach the output layer, and `read_tokens` those that go through the MLP of the last layer.
        Backward costs twice the forward pass.
        """
        mlp = 3 * self.hidden * self.ffn
        matrices = (self.layers * (self.layer_parameters - 2 * self.hidden) - mlp) * tokens + mlp * read_tokens
        attention = self.layers * 2 * self.query_width * squared_lengths / 2
        head = self.padded_vocab * self.hidden
        return 3.0 * (2 * matrices + 2 * attention + 2 * head * target_tokens)


def pad_vocabulary(vocab_size: int, multiple: int) -> int:
    """Return `vocab_size` rounded up to `multiple`: embedding rows, independent of the layout."""
    return -(-vocab_size // multiple) * multiple


def model_sizes(model: ModelSection, vocab_size: int) -> ModelSizes:
    """Return the widths of `model` with a tokenizer of `vocab_size` entries."""
    head_dim = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    return ModelSizes(
        hidden=model.hidden_size,
        head_dim=head_dim,
        query_width=head_dim * model.num_attention_heads,
        kv_width=head_dim * groups,
        ffn=model.ffn_hidden_size,
        layers=model.num_layers,
        padded_vocab=pad_vocabulary(vocab_size, model.make_vocab_size_divisible_by),
        tied=model.share_embeddings_and_output_weights,
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    sizes: ModelSizes,
    parallel: ParallelSection,
    ranks: ParallelSizes,
    tokens: int,
    bf16: bool,
    recompute: str,
) -> MemoryEstimate:
    """Estimate the bytes of one training rank with `tokens` in a micro-batch.

    Weights 2 or 4 bytes, gradients 4 (fp32 reduction) or 2, optimizer 12 (main weight and two moments; 8 where the
    weights are fp32 already), sharded over data parallel ranks by the distributed optimizer. Activations are what the
    backward pass of a layer keeps: inputs and outputs of both norms, rotated queries and keys, the projection that
    values are a view of, the attention's output, and gate, up and product of a fused SwiGLU. With `full`
    recomputation they are one input for each layer and the inside of one.
    """
    local = sizes.parameters / ranks.tensor
    shards = ranks.data * ranks.context if parallel.use_distributed_optimizer else 1
    element = 2 if bf16 else 4
    gradient = 4 if parallel.grad_reduce_in_fp32 or not bf16 else 2
    split = ranks.tensor if parallel.sequence_parallel else 1
    kept = 4 * sizes.hidden / split + (3 * sizes.query_width + 3 * sizes.kv_width + 3 * sizes.ffn) / ranks.tensor
    layers = kept * sizes.layers if recompute != "full" else sizes.hidden / split * sizes.layers + kept
    targets = sizes.padded_vocab / ranks.tensor * tokens / ranks.context
    # A piece in fp32 and its gradient, and what is kept of all.
    logits = 2 * min(4 * targets, LOGITS_PIECE_BYTES["cuda"])
    logits += element * targets if element * targets <= LOGITS_KEPT_BYTES else 0
    activations = tokens * layers * element / ranks.context + logits
    return MemoryEstimate(
        weights=local * element,
        gradients=local * gradient,
        optimizer=local * (12 if bf16 else 8) / shards,
        activations=activations,
    )
