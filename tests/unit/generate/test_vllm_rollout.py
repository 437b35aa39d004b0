"""What a rollout asks of vLLM, with a stand-in for it: no device is needed."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers

from offline_align.config.sections import Device, Engine, GenerateSection, ParallelSection, RunSection
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import AlignError
from offline_align.generate import engines, vllm_in_process
from offline_align.generate.requests import Request
from offline_align.generate.vllm_engine import VllmEngine

CUDA = torch.device("cuda", 0)
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")


class LLM:
    """Answers every request with the ids 5, 6 and the end, and records what it is asked."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.environment = arguments, dict(os.environ)
        self.calls: list[Any] = []
        self.model = SimpleNamespace(load_weights=lambda tensors: self.calls.extend(tensors))
        self.llm_engine = self
        self.waiting: list[tuple[str, Any, Any]] = []

    def add_request(self, name: str, prompt: Any, parameters: Any) -> None:
        self.waiting.append((name, prompt, parameters))

    def step(self) -> list[Any]:
        name, _, parameters = self.waiting.pop()
        self.calls.append(parameters)
        ids = [5, 6, parameters.stop_token_ids[0]]
        # As vLLM, for `logprobs=0`: a table of the sampled id alone.
        asked = parameters.logprobs is not None
        table = [{token: SimpleNamespace(logprob=-float(token))} for token in ids] if asked else None
        output = SimpleNamespace(token_ids=ids, logprobs=table)
        return [SimpleNamespace(finished=True, request_id=name, outputs=[output])]

    def abort_request(self, names: list[str]) -> None:
        assert not names

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake up")


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    from offline_align.distributed.setup import session

    with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)):
        yield


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, policy: Path, tokenizer: Tokenizer) -> Callable[..., tuple[VllmEngine, Any]]:
    vllm, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    stand_ins: Any = vllm
    stand_ins.LLM, stand_ins.SamplingParams = LLM, SimpleNamespace
    cast(Any, inputs).TokensPrompt = dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 80))
    # Another command of this process may have set them.
    for name in (*RANK_NAMES, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def run(token_details: bool, seed: int = 1) -> tuple[VllmEngine, Any]:
        engine = engines.load_engine(
            Engine.vllm,
            policy,
            tokenizer,
            GenerateSection(temperature=1.0),
            seed=seed,
            device=CUDA,
            bf16=True,
            max_length=128,
            token_details=token_details,
        )
        assert isinstance(engine, VllmEngine)
        return engine, engine._llm

    return run


def test_a_rollout_shares_process_and_memory_with_the_trainer(load: Callable[..., tuple[VllmEngine, Any]]) -> None:
    _, llm = load(token_details=True)
    assert llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert llm.arguments["enable_sleep_mode"]
    assert not llm.arguments["enable_prefix_caching"]
    assert llm.arguments["logprobs_mode"] == "processed_logprobs"
    assert 0.5 < llm.arguments["gpu_memory_utilization"] < 60 / 80
    seen = {name: llm.environment.get(name) for name in RANK_NAMES}
    assert seen == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    assert not any(name in os.environ for name in RANK_NAMES)


def test_generate_still_has_a_process_of_its_own(load: Callable[..., tuple[VllmEngine, Any]]) -> None:
    engine, llm = load(token_details=False)
    assert "enable_sleep_mode" not in llm.arguments
    assert "RANK" not in llm.environment
    ((answer,),) = engine.answers([Request(0, 0, [1, 2], 8)])
    assert answer.token_ids == answer.log_probs == ()
    assert llm.calls[0].logprobs is None


def test_answers_have_the_sampled_ids_and_their_log_probabilities(
    load: Callable[..., tuple[VllmEngine, Any]], tokenizer: Tokenizer
) -> None:
    engine, llm = load(token_details=True)
    ((answer,),) = engine.answers([Request(0, 0, [1, 2], 8)])
    end = float(tokenizer.eos_id)
    assert answer.token_ids == (5, 6, tokenizer.eos_id)
    assert answer.log_probs == (-5.0, -6.0, -end)
    assert (answer.finish_reason, answer.num_tokens) == ("stop", 3)
    ((cut,),) = engine.answers([Request(0, 0, [1, 2], 2)])
    assert (cut.token_ids, cut.log_probs, cut.finish_reason) == ((5, 6), (-5.0, -6.0), "length")
    assert llm.calls[0].logprobs == 0


def test_a_new_seed_gives_the_samples_of_an_engine_that_was_loaded_with_it(
    load: Callable[..., tuple[VllmEngine, Any]],
) -> None:
    engine, llm = load(token_details=True)
    other, llm_of_other = load(token_details=True, seed=2)
    for one in (engine, other):
        list(one.answers([Request(3, 0, [1], 8)]))
    engine.reseed(2)
    list(engine.answers([Request(3, 0, [1], 8)]))
    before, after = (parameters.seed for parameters in llm.calls)
    assert before != after == llm_of_other.calls[0].seed


def test_weights_are_handed_over_one_by_one_and_checked(
    load: Callable[..., tuple[VllmEngine, Any]], policy: Path
) -> None:
    engine, llm = load(token_details=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy)
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    engine.replace_weights(iter(weights))
    assert [(name, tensor.data_ptr()) for name, tensor in llm.calls] == [(n, t.data_ptr()) for n, t in weights]
    with pytest.raises(AlignError, match="missing, such as lm_head.weight"):
        engine.replace_weights(weights[:-1])


def test_the_engine_sleeps_while_the_trainer_works(load: Callable[..., tuple[VllmEngine, Any]]) -> None:
    engine, llm = load(token_details=True)
    engine.resume()
    engine.release()
    engine.resume()
    engine.resume()
    assert llm.calls == ["sleep 1", "wake up"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_off_while_the_engine_is_awake(
    load: Callable[..., tuple[VllmEngine, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    switched: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", switched.append)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    engine, llm = load(token_details=True)
    assert llm.environment[name] == "max_split_size_mb:64,expandable_segments:False"
    assert os.environ[name] == "max_split_size_mb:64,expandable_segments:True"
    engine.release()
    engine.resume()
    assert switched == [f"expandable_segments:{on}" for on in (False, True, False)]
    switched.clear()
    monkeypatch.setenv(name, "")
    vllm_in_process.set_expandable_segments(False)
    assert switched == []
