"""Random tiny models of every supported family, saved by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama_linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama_yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}

Save = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Threads slow models of this size down.
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def save_model(tmp_path: Path) -> Save:
    """Save a random model (`family`, head class, dtype) and return its folder."""

    def save(family: str, head: str = "ForCausalLM", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
        prefix, special = FAMILIES[family]
        torch.manual_seed(7)
        labels = {"num_labels": 1} if head != "ForCausalLM" else {}
        config = getattr(transformers, f"{prefix}Config")(**(SIZES | special | labels))
        model = getattr(transformers, f"{prefix}{head}")(config).to(dtype)
        for name, parameter in model.named_parameters():
            # Norms start at one and biases at zero, which would hide swapped tensors.
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        folder = tmp_path / f"{family}-{head}"
        model.save_pretrained(folder, **more)
        return folder

    return save


@pytest.fixture
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Read all safetensors files of a folder."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}

    return read
