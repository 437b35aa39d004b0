import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from offline_align.config.sections import ModelSection
from offline_align.convert import architecture
from offline_align.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def read(tmp_path: Path, **changes: Any) -> architecture.Architecture:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    return architecture.read_architecture(tmp_path)


def test_absent_keys_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    model = read(tmp_path).model
    theirs = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})
    assert model.layernorm_epsilon == theirs.rms_norm_eps
    assert model.rotary_base == theirs.rope_parameters["rope_theta"]
    assert model.share_embeddings_and_output_weights is theirs.tie_word_embeddings
    assert (model.num_query_groups, model.kv_channels, model.sliding_window) == (None, None, None)


def test_old_and_new_rope_keys_mean_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}).model
    new = read(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}).model
    assert old == new
    assert old.rotary_base == 5e5
    assert old.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1},
            "use_sliding_window",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, **changes)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, attention_bias=True, hidden_act="gelu")
    assert len(caught.value.problems) == 2


def test_a_folder_without_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        architecture.read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        architecture.read_architecture(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2, "kv_channels": 16},
        {"share_embeddings_and_output_weights": True},
        {"sliding_window": 16},
        {"add_qkv_bias": True},
        {"add_qkv_bias": True, "sliding_window": 16},
        {"qk_layernorm": True, "kv_channels": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rotary_base": 5e5},
    ],
)
@pytest.mark.parametrize("kind", ["policy", "reward_model"])
def test_written_config_reads_back_as_the_same_model(tmp_path: Path, changes: dict[str, Any], kind: Any) -> None:
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    model = ModelSection(**(fields | changes))
    config = architecture.huggingface_config(model, kind, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architecture.read_architecture(tmp_path)
    assert found.model == model
    assert found.kind == kind
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == model.rotary_base
    assert theirs.rope_parameters["rope_type"] == model.rope_scaling.get("rope_type", "default")
    assert theirs.head_dim == (model.kv_channels or 8)
    assert getattr(theirs, "sliding_window", None) == model.sliding_window


def test_no_family_has_both_biases_and_norms() -> None:
    model = ModelSection(add_qkv_bias=True, qk_layernorm=True)
    with pytest.raises(ConfigError, match="add_qkv_bias"):
        architecture.huggingface_config(model, "policy", "float32")


def test_an_adapter_beside_a_config_is_refused(tmp_path: Path) -> None:
    """The folder is ambiguous: transformers with peft would load the adapter instead."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"init\.from: .* holds an adapter \(adapter_config\.json\)"):
        read(tmp_path)
