"""A small random policy in Hugging Face format."""

from pathlib import Path
from typing import Any

from offline_align.data.tokenizer import Tokenizer


def save_random_llama(folder: Path, tokenizer: Tokenizer, spread: float = 0.4, **settings: Any) -> Path:
    """Write a two-layer Llama for this tokenizer. `spread` makes its answers depend on the prompt."""
    import torch
    import transformers

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
        **(shape | settings),
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, spread)
    model.save_pretrained(folder)
    return folder
