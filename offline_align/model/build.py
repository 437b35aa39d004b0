"""Build megatron-core's GPTModel from a model section. Only this module sets fields of TransformerConfig.

megatron-core 0.19 deprecates `GPTModel` in favour of `HybridModel`. `GPTModel` is used because other
tools exchange checkpoints in its form; a change would only affect this package.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from offline_align.config.sections import Backend, ModelSection, ParallelSection, Recompute
from offline_align.errors import ConfigError
from offline_align.model.activation import SwiGLU
from offline_align.model.attention import PackedAttention
from offline_align.model.backend import can_compile, choose_backend
from offline_align.model.embedding import convert_to_packed
from offline_align.model.heads import Policy, RewardHead, RewardModel
from offline_align.model.layers import layer_specs
from offline_align.model.norm import RMSNorm
from offline_align.model.rotary import PackedRotaryEmbedding, inverse_frequencies
from offline_align.model.self_attention import PackedSelfAttention

logger = logging.getLogger(__name__)


def build_model(
    kind: str,
    model: ModelSection,
    parallel: ParallelSection,
    device: torch.device,
    bf16: bool,
    recompute: Recompute = Recompute.none,
    fp8: bool = False,
) -> Policy | RewardModel:
    """Return this rank's part of a randomly initialised policy or reward model on `device`.

    `kind` is "policy" or "reward_model". `model.vocab_size` must be set. With `fp8`, linear layers
    multiply in fp8 (Transformer Engine). On the CPU, initial weights depend on the seed and not on the
    parallel layout.

    Raises ConfigError if TransformerConfig refuses a field, or if the device or installation does not
    support the backend or fp8.
    """
    # megatron warns of GPTModel's deprecation at every construction; see the docstring of this module.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    assert model.vocab_size is not None
    backend = choose_backend(model.backend, device, bf16)
    if fp8 and backend is not Backend.transformer_engine:
        raise ConfigError("trainer.precision=fp8: needs Transformer Engine and a CUDA device; use bf16")
    config = transformer_config(model, parallel, device, bf16, recompute, fp8)
    cls = Policy if kind == "policy" else RewardModel
    built = cls(
        config=config,
        transformer_layer_spec=_block_spec(model, config, backend),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        # `PackedSelfAttention` applies rotary embeddings itself, with angles computed once per bin.
        position_embedding_type="none",
    )
    convert_to_packed(built.embedding.word_embeddings)
    built.rotary = PackedRotaryEmbedding(*inverse_frequencies(model))
    if isinstance(built, RewardModel):
        built.replace_output_layer(RewardHead(model.hidden_size, model.init_method_std, device))
    else:
        # The head gathers the sequence and selects the targets before the output layer, so that layer
        # must not gather again.
        built.output_layer.sequence_parallel = False
        built.num_tokens = model.vocab_size
    built.to(device)
    return built


# Fields that change the forward pass of megatron's attention, which `PackedSelfAttention` replaces.
_UNSUPPORTED = frozenset({"attention_output_gate", "multi_latent_attention", "no_rope_freq", "rotary_interleaved"})


def unknown_overrides(model: ModelSection) -> list[str]:
    """Return an error line for each of `model.overrides` that megatron or `PackedSelfAttention` does not support."""
    known = set(TransformerConfig.__dataclass_fields__)
    lines = []
    for name, value in model.overrides.items():
        if name not in known:
            lines.append(f"model.overrides.{name}={value}: TransformerConfig has no such field")
        elif name in _UNSUPPORTED and value:
            lines.append(f"model.overrides.{name}={value}: the attention does not support this; leave the key out")
    return lines


def transformer_config(
    model: ModelSection,
    parallel: ParallelSection,
    device: torch.device,
    bf16: bool,
    recompute: Recompute,
    fp8: bool = False,
) -> TransformerConfig:
    """Return megatron's configuration. Raises ConfigError if megatron refuses it, naming unknown overrides."""
    problems = unknown_overrides(model)
    if problems:
        raise ConfigError(problems)
    values = _fields(model, parallel, device, bf16) | _recompute_fields(recompute) | _fp8_fields(fp8) | model.overrides
    try:
        return TransformerConfig(**values)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"model: megatron-core refuses the configuration: {error}") from error


def _fields(model: ModelSection, parallel: ParallelSection, device: torch.device, bf16: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if bf16 else torch.float32
    compiles = device.type == "cuda" and can_compile()
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_width,
        "layernorm_epsilon": model.layernorm_epsilon,
        "init_method_std": model.init_method_std,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "window_size": (model.sliding_window - 1, 0) if model.sliding_window else None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": device.type == "cpu",
        # Losses and gradients are sums until `train/step.py` divides them by the global count.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        # megatron's fused SwiGLU needs CUDA and a compiler. Otherwise the activation is a module: this
        # project's `SwiGLU`, or Transformer Engine's in its layers.
        "bias_activation_fusion": compiles,
        "use_te_activation_func": not compiles,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # Limit Transformer Engine to cuDNN's attention, so that it never uses the one that pads rows.
        "attention_backend": AttnBackend.fused,
    }


def _recompute_fields(recompute: Recompute) -> dict[str, Any]:
    if recompute is Recompute.none:
        return {}
    if recompute is Recompute.selective:
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8_fields(fp8: bool) -> dict[str, Any]:
    """Return the fields for fp8 with scales of the current tensor, which need no history in checkpoints."""
    return {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if fp8 else {}


def _block_spec(model: ModelSection, config: TransformerConfig, backend: Backend) -> TransformerBlockSubmodules:
    """Return megatron's own layers with this project's attention and norm, or Transformer Engine's layers."""
    if backend is Backend.transformer_engine:
        from offline_align.model.transformer_engine import transformer_engine_block_spec

        return transformer_engine_block_spec(model, config)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_layernorm)
    attention = spec.submodules.self_attention
    qk_norm = RMSNorm if model.qk_layernorm else attention.submodules.q_layernorm
    inner = replace(attention.submodules, core_attention=PackedAttention, q_layernorm=qk_norm, k_layernorm=qk_norm)
    mlp: Any = spec.submodules.mlp
    layer = replace(
        spec.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=ModuleSpec(PackedSelfAttention, attention.params, inner),
        mlp=partial(mlp, submodules=replace(mlp.keywords["submodules"], activation_func=SwiGLU)),
    )
    return TransformerBlockSubmodules(layer_specs=layer_specs(layer, config.num_layers), layer_norm=RMSNorm)
