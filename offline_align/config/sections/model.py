"""What a model is, where it comes from and into which form it goes."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Backend(StrEnum):
    """Layer implementation; `auto` is Transformer Engine where that is installed and CUDA is used, else `torch`."""

    auto = "auto"
    torch = "torch"
    transformer_engine = "transformer_engine"


class ConvertTo(StrEnum):
    """The form that `convert` writes."""

    megatron = "megatron"
    huggingface = "huggingface"


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

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Embedding rows, independent of the layout."""
        assert self.vocab_size is not None
        return self.padded(self.vocab_size)

    def padded(self, vocab_size: int) -> int:
        """Return `vocab_size` rounded up to a multiple of `make_vocab_size_divisible_by`."""
        return -(-vocab_size // self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by


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
