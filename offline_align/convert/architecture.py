"""Convert the `config.json` of a Hugging Face folder to our model section and back.

Settings that our model does not support are refused by name instead of being ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.config.sections import ModelSection
from offline_align.convert import names
from offline_align.convert.names import FAMILIES, MISTRAL, QWEN2, QWEN3, Family, Kind
from offline_align.errors import ConfigError
from offline_align.model.description import refuse_adapter

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Architecture:
    """The model of a Hugging Face folder: its family, policy or reward model, and our model section.

    `extra` is the part that our exporter adds to `config.json` (template, condition, method); it is
    empty for a third-party model. `pad_token_id` is the padding token, at which no reward is read.
    """

    family: Family
    kind: Kind
    model: ModelSection
    extra: dict[str, Any]
    pad_token_id: int | None = None


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture in `folder/config.json`; raises ConfigError with all unsupported settings."""
    # If peft is installed, transformers would load the adapter's base model instead of these weights.
    refuse_adapter(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"init.from: {path} cannot be read ({error}); give a Hugging Face folder") from error
    family, kind = _family(path, config)
    try:
        problems = _problems(family, kind, config)
        if not problems:
            ours = dict(config.get("offline_align") or {})
            return Architecture(family, kind, _model(family, config), ours, config.get("pad_token_id"))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        problems = [f"is not the configuration of a model ({type(error).__name__}: {error})"]
    raise ConfigError([f"init.from: {path}: {problem}" for problem in problems])


def _family(path: Path, config: Any) -> tuple[Family, Kind]:
    found = config.get("architectures") if isinstance(config, dict) else None
    for family in FAMILIES:
        if found == [family.policy_class]:
            return family, "policy"
        if found == [family.reward_model_class]:
            return family, "reward_model"
    known = ", ".join(name for family in FAMILIES for name in (family.policy_class, family.reward_model_class))
    raise ConfigError(f"init.from: {path}: architectures={found} is not supported; supported: {known}")


def _problems(family: Family, kind: Kind, config: Mapping[str, Any]) -> list[str]:
    problems = [f"{key} is missing" for key in _REQUIRED if not isinstance(config.get(key), int)]
    refused = {
        "attention_bias": "our model has no bias in the attention output",
        "mlp_bias": "our model has no bias in the MLP",
        "quantization_config": "quantised weights cannot be trained; use the unquantised model",
    }
    problems += [f"{key}={config[key]}: {why}" for key, why in refused.items() if config.get(key)]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={config['hidden_act']}: only silu (SwiGLU) is supported")
    rope = _rope(config)
    if rope["rope_type"] not in ROPE_TYPES:
        problems.append(f"rope_type={rope['rope_type']}: supported are {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor is not 1.0: only full rotary embeddings are supported")
    if kind == "reward_model" and _num_labels(config) != 1:
        problems.append(f"num_labels={_num_labels(config)}: a reward model has one label")
    if family in (QWEN2, QWEN3) and len(_attention_types(config)) > 1:
        problems.append("use_sliding_window=true on some layers only: all layers must have the same window")
    return problems


def _num_labels(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if labels is not None else int(config.get("num_labels", 2))


def _attention_types(config: Mapping[str, Any]) -> set[str]:
    """Return the attention types that occur in the layers of a Qwen model."""
    if not config.get("use_sliding_window", False):
        return {"full_attention"}
    layers, first = config.get("num_hidden_layers", 0), config.get("max_window_layers", 28)
    default = ("full_attention" if layer < first else "sliding_attention" for layer in range(layers))
    return set(config.get("layer_types") or default)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings (`rope_type`, `rope_theta`, ...) from the new or the old keys."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(config)
    del rope["rope_theta"]
    rope.pop("partial_rotary_factor", None)
    if rope["rope_type"] == "default":
        return {}
    if rope["rope_type"] in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def _head_width(family: Family, config: Mapping[str, Any]) -> int | None:
    even: int = config["hidden_size"] // config["num_attention_heads"]
    width = config.get("head_dim")
    if width is None and family is QWEN3 and "head_dim" not in config:
        width = 128  # Qwen3's own default, unlike the other families'
    return None if width in (None, even) else int(width)


def _sliding_window(family: Family, config: Mapping[str, Any]) -> int | None:
    windowed = family is MISTRAL or (family in (QWEN2, QWEN3) and _attention_types(config) == {"sliding_attention"})
    window = config.get("sliding_window", 4096) if windowed else None
    return None if window is None else int(window)


def _model(family: Family, config: Mapping[str, Any]) -> ModelSection:
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    return ModelSection(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=None if groups == heads else groups,
        kv_channels=_head_width(family, config),
        max_position_embeddings=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        rotary_base=float(_rope(config)["rope_theta"]),
        rope_scaling=_rope_scaling(config),
        layernorm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        init_method_std=float(config.get("initializer_range", 0.02)),
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        add_qkv_bias=family is QWEN2,
        qk_layernorm=family is QWEN3,
        sliding_window=_sliding_window(family, config),
    )


def huggingface_config(model: ModelSection, kind: Kind, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of `model` without token ids, with the keys of transformers 4 and 5.

    Version 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`; version 5 `rope_parameters` and
    `dtype`.
    """
    family = names.family_of(model)
    scaling = dict(model.rope_scaling)
    config: dict[str, Any] = {
        "architectures": [family.policy_class if kind == "policy" else family.reward_model_class],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": model.rotary_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return config | _window_keys(family, model.sliding_window) | _label_keys(kind)


def _window_keys(family: Family, window: int | None) -> dict[str, Any]:
    if family is MISTRAL:
        return {"sliding_window": window}
    if family in (QWEN2, QWEN3):
        return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return {"mlp_bias": False}


def _label_keys(kind: Kind) -> dict[str, Any]:
    if kind == "policy":
        return {}
    return {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
