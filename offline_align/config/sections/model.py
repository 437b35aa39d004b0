"""Sections for the model, its initial weights and its conversion."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Backend(StrEnum):
    """Layer implementation.

    `auto` selects Transformer Engine if it is installed and the run uses CUDA, else `torch`.
    """

    auto = "auto"
    torch = "torch"
    transformer_engine = "transformer_engine"


class ConvertTo(StrEnum):
    """The checkpoint format that `convert` writes."""

    megatron = "megatron"
    huggingface = "huggingface"


@dataclass(frozen=True)
class InitSection:
    """Where the initial weights come from."""

    from_: str | None = None
    """Run folder, checkpoint folder or Hugging Face folder with the initial weights. If unset, the
    weights are random."""


@dataclass(frozen=True)
class ModelSection:
    """Architecture and tokenizer: a Llama-shaped GPT (SwiGLU, RoPE, RMSNorm, no bias, no dropout).

    If `init.from` names a model, its architecture is used; this section is then only checked.
    """

    num_layers: int = MISSING
    """Number of transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU inner layer."""
    num_attention_heads: int = MISSING
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention). If unset, the number of query heads."""
    kv_channels: int | None = None
    """Width of one attention head. If unset, `hidden_size / num_attention_heads`."""
    max_position_embeddings: int = 4096
    """Maximum sequence length in tokens (paper: 4096)."""
    vocab_size: int | None = None
    """Vocabulary size. If unset, it is read from the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """The number of embedding rows is padded to a multiple of this. The padded number must be
    divisible by the tensor parallel size."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """RoPE scaling, written as the `rope_scaling` mapping of Hugging Face (`rope_type` llama3,
    linear or yarn). If empty, no scaling."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_method_std: float = 0.02
    """Standard deviation of random initial weights."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the embedding (paper: untied)."""
    add_qkv_bias: bool = False
    """Add a bias to the query/key/value projection (Qwen2)."""
    qk_layernorm: bool = False
    """Apply RMSNorm to queries and keys (Qwen3)."""
    sliding_window: int | None = None
    """Size of the attention window in tokens (Mistral). If unset, full causal attention."""
    tokenizer: str | None = None
    """SentencePiece `.model`, `tokenizer.json` or Hugging Face folder. If unset, the tokenizer of
    `init.from`."""
    backend: Backend = Backend.auto
    """Layer implementation. `auto` selects Transformer Engine if it is installed and the run uses
    CUDA, else torch."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """More fields of megatron-core's TransformerConfig. Unknown names are rejected."""

    @property
    def head_width(self) -> int:
        """Return the width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Return the number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Return the padded number of embedding rows. It does not depend on the parallel layout."""
        assert self.vocab_size is not None
        return self.padded(self.vocab_size)

    def padded(self, vocab_size: int) -> int:
        """Return `vocab_size` rounded up to a multiple of `make_vocab_size_divisible_by`."""
        return -(-vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by


class ConvertDtype(StrEnum):
    """Precision of the written weights; `auto` is that of the model in which the chain of runs began."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class ConvertSection:
    """Conversion between checkpoint formats."""

    to: ConvertTo = ConvertTo.huggingface
    """Format to write: `huggingface` or `megatron`."""
    dtype: ConvertDtype = ConvertDtype.auto
    """Precision of the written weights. `auto` is that of the Hugging Face folder from which the
    first training started, also if the policy was trained in another one, or that of the checkpoint
    if training started from random weights."""
    max_shard_size: str = "5GB"
    """Maximum size of one safetensors file in a Hugging Face folder."""
    evaluation: str | None = None
    """Run folder of an `evaluate` run whose table goes into the model card. It must compare answers
    of this policy."""
    check: bool = False
    """Load the written model with transformers and compare its logits or scores with those of the
    source, in fp32. Both models must fit into memory."""
