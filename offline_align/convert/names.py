"""Hugging Face tensor names and ours: one table per family, with shapes and tensor-parallel axes.

A row of a table joins the Hugging Face tensors `parts` into our tensor `ours`. Shapes use symbolic
names, whose values `sizes` returns, so a file can be checked before its tensors are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from offline_align.config.sections import ModelSection
from offline_align.errors import ConfigError

Kind = Literal["policy", "reward_model"]


class Join(StrEnum):
    """How the parts of a table row become one tensor."""

    copy = "copy"
    query_groups = "query_groups"
    """Query, key and value rows, interleaved by query group."""
    stack = "stack"
    """Gate and up projections, stacked in this order."""
    vocabulary = "vocabulary"
    """Rows padded to a multiple of `make_vocab_size_divisible_by`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor and its shape, in names of `sizes`."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our tensors, the Hugging Face tensors it is made of, and the tensor parallel axis."""

    ours: str
    parts: tuple[Part, ...]
    tp_axis: int | None = None
    join: Join = Join.copy


@dataclass(frozen=True, slots=True)
class Family:
    """A `transformers` architecture: `model_type`, class names and layer table."""

    model_type: str
    policy_class: str
    reward_model_class: str
    layer: tuple[Entry, ...]


def _entry(ours: str, theirs: str, *shape: str, tp_axis: int | None = None) -> Entry:
    return Entry(ours, (Part(theirs, shape),), tp_axis)


def _query_key_value(suffix: str, *tail: str) -> Entry:
    parts = (
        Part(f"self_attn.q_proj.{suffix}", ("query", *tail)),
        Part(f"self_attn.k_proj.{suffix}", ("key", *tail)),
        Part(f"self_attn.v_proj.{suffix}", ("key", *tail)),
    )
    return Entry(f"self_attention.linear_qkv.{suffix}", parts, 0, Join.query_groups)


_GATE_UP = Entry(
    "mlp.linear_fc1.weight",
    (Part("mlp.gate_proj.weight", ("ffn", "hidden")), Part("mlp.up_proj.weight", ("ffn", "hidden"))),
    0,
    Join.stack,
)
_LLAMA_LAYER = (
    _entry("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    _query_key_value("weight", "hidden"),
    _entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "query", tp_axis=1),
    _entry("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    _GATE_UP,
    _entry("mlp.linear_fc2.weight", "mlp.down_proj.weight", "hidden", "ffn", tp_axis=1),
)
_QUERY_KEY_NORMS = (
    _entry("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "channels"),
    _entry("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "channels"),
)
_EMBEDDING = Entry(
    "embedding.word_embeddings.weight",
    (Part("model.embed_tokens.weight", ("vocabulary", "hidden")),),
    0,
    Join.vocabulary,
)
_OUTPUT = Entry("output_layer.weight", (Part("lm_head.weight", ("vocabulary", "hidden")),), 0, Join.vocabulary)
_FINAL_NORM = _entry("decoder.final_layernorm.weight", "model.norm.weight", "hidden")
_REWARD_HEAD = _entry("reward_head.weight", "score.weight", "one", "hidden")

LLAMA = Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification", _LLAMA_LAYER)
MISTRAL = Family("mistral", "MistralForCausalLM", "MistralForSequenceClassification", _LLAMA_LAYER)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", (*_LLAMA_LAYER, _query_key_value("bias")))
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", (*_LLAMA_LAYER, *_QUERY_KEY_NORMS))
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)


def family_of(model: ModelSection) -> Family:
    """Return the family that can represent `model`; raises ConfigError if none can."""
    if model.add_qkv_bias and model.qk_layernorm:
        raise ConfigError(
            "model.add_qkv_bias=true with model.qk_layernorm=true: no Hugging Face family has both; unset one"
        )
    if model.qk_layernorm:
        return QWEN3
    if model.add_qkv_bias:
        return QWEN2
    return LLAMA if model.sliding_window is None else MISTRAL


def sizes(model: ModelSection) -> dict[str, int]:
    """Return the value of every symbolic name in the shapes of the tables."""
    assert model.vocab_size is not None
    return {
        "one": 1,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "channels": model.head_width,
        "query": model.num_attention_heads * model.head_width,
        "key": model.query_groups * model.head_width,
        "vocabulary": model.vocab_size,
    }


def entries(family: Family, model: ModelSection, kind: Kind) -> Iterator[Entry]:
    """Yield the table of a whole model, in the order of its layers, with full tensor names."""
    yield _EMBEDDING
    for layer in range(model.num_layers):
        for entry in family.layer:
            parts = tuple(replace(part, name=f"model.layers.{layer}.{part.name}") for part in entry.parts)
            yield replace(entry, ours=f"decoder.layers.{layer}.{entry.ours}", parts=parts)
    yield _FINAL_NORM
    if kind == "reward_model":
        yield _REWARD_HEAD
    elif not model.share_embeddings_and_output_weights:
        yield _OUTPUT


def part_shapes(family: Family, model: ModelSection, kind: Kind) -> dict[str, list[int]]:
    """Return the shape of every Hugging Face tensor of a whole model, in the order of its layers."""
    size = sizes(model)
    parts = (part for entry in entries(family, model, kind) for part in entry.parts)
    return {part.name: [size[axis] for axis in part.shape] for part in parts}
