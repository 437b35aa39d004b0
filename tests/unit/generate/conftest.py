"""A random tiny policy in Hugging Face form with its tokenizer, and prompts for it."""

from pathlib import Path

import pytest
import torch
import transformers

from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from tests.small_tokenizers import write_sentencepiece


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Threads cost more than they bring for models of this size.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Wide enough for answers that differ from prompt to prompt.
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    return folder
