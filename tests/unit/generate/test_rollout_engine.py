"""Sampled ids, their log-probabilities, seeds and new weights of the transformers engine."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from offline_align.config.sections import Engine, GenerateSection
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import AlignError, ConfigError
from offline_align.generate import engines
from offline_align.generate.requests import Completion, Request
from tests.random_llama import save_random_llama

TEXTS = ["Hello, how are you?", "Hi", "The quick brown fox jumps over the lazy dog, again and again."]


@pytest.fixture
def requests(tokenizer: Tokenizer) -> list[Request]:
    # The last has less room than the others of its batch.
    rooms = [24, 24, 5]
    return [Request(k, 0, tokenizer.encode(text), rooms[k]) for k, text in enumerate(TEXTS)]


def load(policy: Path, tokenizer: Tokenizer, seed: int = 1, **settings: Any) -> Any:
    section = GenerateSection(**{"temperature": 1.0} | settings)
    cpu, name = torch.device("cpu"), Engine.transformers
    return engines.load_engine(
        name, policy, tokenizer, section, seed=seed, device=cpu, bf16=False, max_length=128, token_details=True
    )


def weights(policy: Path) -> list[tuple[str, Tensor]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def log_probs(policy: Path, request: Request, ids: Sequence[int], temperature: float) -> list[float]:
    """Return the log-probabilities of `ids` by one forward pass over the whole row in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([request.context + list(ids)])).logits[0, len(request.context) - 1 : -1]
    found = torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(ids)[:, None])
    return [float(number) for number in found[:, 0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_details_are_the_sampled_ids_and_their_log_probabilities(
    policy: Path, tokenizer: Tokenizer, requests: list[Request], temperature: float
) -> None:
    answers: list[Completion] = load(policy, tokenizer, temperature=temperature).complete(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == len(answer.log_probs) == answer.num_tokens <= request.max_new_tokens
        expected = log_probs(policy, request, answer.token_ids, temperature)
        assert answer.log_probs == pytest.approx(expected, abs=1e-4)
        ended = answer.token_ids[-1] == tokenizer.eos_id
        assert answer.finish_reason == ("stop" if ended else "length")
        text = answer.token_ids[:-1] if ended else answer.token_ids
        assert tokenizer.eos_id not in text
        assert answer.response == tokenizer.decode(list(text))


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_early_leave_the_others_as_they_are(
    family: str, tokenizer: Tokenizer, requests: list[Request], tmp_path: Path
) -> None:
    """Answers are longer than a sliding window, and rows leave the batch at different steps."""
    prefix, special = FAMILIES[family]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=tokenizer.vocab_size, num_hidden_layers=2, max_position_embeddings=128, **(shape | special)
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(tmp_path)
    asked = [Request(k, 0, requests[k % 3].context, room) for k, room in enumerate((20, 3, 40, 1, 11))]
    engine = load(tmp_path, tokenizer)
    rows: list[int] = []
    hook = engine._model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    together = engine.complete(asked)
    hook.remove()
    assert sum(rows) == sum(answer.num_tokens for answer in together), "a row was computed behind its end"
    assert len({answer.num_tokens for answer in together}) > 3
    for request, answer in zip(asked, together, strict=True):
        assert answer.log_probs == pytest.approx(log_probs(tmp_path, request, answer.token_ids, 1.0), abs=1e-4)
        (alone,) = engine.complete([request])
        assert alone.token_ids == answer.token_ids


def test_an_answer_ends_with_the_id_that_ended_it(policy: Path, tokenizer: Tokenizer) -> None:
    """Every token ends an answer in one of both engines, so both reasons to end are seen."""
    asked = [Request(row, 0, tokenizer.encode("Hi"), 4) for row in range(8)]
    engine = load(policy, tokenizer)
    plain = engine.complete(asked)
    engine._eos_ids = frozenset(answer.token_ids[1] for answer in plain)
    for before, answer in zip(plain, engine.complete(asked), strict=True):
        end = next(k for k, token in enumerate(before.token_ids) if token in engine._eos_ids)
        assert answer.token_ids == before.token_ids[: end + 1]
        assert answer.log_probs == pytest.approx(before.log_probs[: end + 1], abs=1e-6)
        assert answer.finish_reason == "stop"


def test_a_rollout_depends_on_seed_and_request_alone(
    policy: Path, tokenizer: Tokenizer, requests: list[Request]
) -> None:
    engine = load(policy, tokenizer, seed=1)
    first = engine.complete(requests)
    engine.reseed(2)
    second = engine.complete(requests)
    assert second == load(policy, tokenizer, seed=2).complete(requests)
    assert [answer.token_ids for answer in first] != [answer.token_ids for answer in second]
    engine.reseed(1)
    assert engine.complete(requests) == first


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_give_the_answers_of_an_engine_that_was_loaded_with_them(
    policy: Path, tokenizer: Tokenizer, requests: list[Request], tied: bool, tmp_path: Path
) -> None:
    start = save_random_llama(tmp_path / "start", tokenizer, 0.3, tie_word_embeddings=tied)
    after = save_random_llama(tmp_path / "after", tokenizer, 0.4, tie_word_embeddings=tied)
    expected = load(after, tokenizer).complete(requests)
    engine = load(start, tokenizer)
    assert engine.complete(requests) != expected
    engine.replace_weights(weights(after))
    engine.release()
    engine.resume()
    assert engine.complete(requests) == expected


def test_wrong_weights_are_refused_by_name(policy: Path, tokenizer: Tokenizer) -> None:
    engine, given = load(policy, tokenizer), weights(policy)
    last, tensor = given[-1]
    for wrong, message in (
        (given[:-1], f"1 of the model are missing, such as {last}"),
        ([*given, given[0]], f"{given[0][0]} is given twice"),
        ([("model.other", tensor), *given], "model.other is not part of the model"),
        ([*given[:-1], (last, tensor[:1])], rf"{last} has shape .* not "),
    ):
        with pytest.raises(AlignError, match=message):
            engine.replace_weights(wrong)


def test_settings_that_change_the_distribution_are_refused(policy: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as caught:
        load(policy, tokenizer, temperature=0, top_p=0.9, stop=["User:"], n=2)
    keys = [problem.split("=")[0].split(":")[0] for problem in caught.value.problems]
    assert keys == ["generate.temperature", "generate.top_p", "generate.stop", "generate.n"]
    (problem,) = engines.rollout_problems(GenerateSection(temperature=1.0), Engine.vllm, on_cpu=True)
    assert problem.startswith("generate.engine=vllm")


def test_log_probabilities_are_finite(policy: Path, tokenizer: Tokenizer, requests: list[Request]) -> None:
    answers = load(policy, tokenizer).complete([Request(row, 0, requests[0].context, 24) for row in range(16)])
    numbers = [number for answer in answers for number in answer.log_probs]
    assert all(-math.inf < number <= 0 for number in numbers)
