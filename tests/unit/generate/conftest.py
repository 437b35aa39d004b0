"""A random tiny policy in Hugging Face format with its tokenizer, and prompts for it."""

from pathlib import Path

import pytest
import torch

from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from tests.random_llama import save_random_llama
from tests.small_tokenizers import write_sentencepiece


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Threads slow models of this size down.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("policy"), tokenizer)
