"""The engine's log-probabilities of sampled ids are those of the trainer's packed forward pass."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offline_align.config.sections import Device, Engine, GenerateSection, ParallelSection, RunSection, Template
from offline_align.convert.architecture import read_architecture
from offline_align.convert.live import live_tensors
from offline_align.convert.load import load_huggingface
from offline_align.data.batch import PackedBatch
from offline_align.data.collate import Segment, Targets, assemble
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.generate import engines
from offline_align.generate.requests import Completion, Request
from tests.random_llama import save_random_llama
from tests.small_tokenizers import TEMPLATES, write_hugging_face, write_sentencepiece

TEXTS = ["Hello, how are you?", "Hi", "The quick brown fox jumps over the lazy dog, again and again."]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    from offline_align.distributed.setup import session

    with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)):
        yield


def renderer_of(form: str, folder: Path) -> Renderer:
    """Return a renderer of the paper's template, or of a chat template that writes text around answers or none."""
    if form == "paper":
        return Renderer(load_tokenizer(write_sentencepiece(folder)), Template.paper)
    return Renderer(load_tokenizer(write_hugging_face(folder, TEMPLATES[form])), Template.chat)


def trainer_model(folder: Path) -> tuple[Any, Any]:
    from offline_align.model.build import build_model

    found = read_architecture(folder)
    model = build_model(found.kind, found.model, ParallelSection(), torch.device("cpu"), bf16=False).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_huggingface(folder):
            parameters[name].copy_(tensor)
    return found, model


def load(folder: Path, tokenizer: Tokenizer, end_ids: frozenset[int]) -> Any:
    cpu, name = torch.device("cpu"), Engine.transformers
    more: dict[str, Any] = {"bf16": False, "max_length": 128, "end_ids": end_ids, "token_details": True}
    return engines.load_engine(name, folder, tokenizer, GenerateSection(temperature=1.0), seed=1, device=cpu, **more)


def bin_of(requests: Sequence[Request], answers: Sequence[Completion]) -> PackedBatch:
    """Return one bin of all rows, whose targets are the sampled ids."""
    pairs = zip(requests, answers, strict=True)
    rows = [np.array(request.context + list(answer.token_ids), np.int32) for request, answer in pairs]
    segments = [Segment(row, number, 0) for number, row in enumerate(rows)]
    starts = np.array([len(request.context) for request in requests], np.int32)
    targets = Targets(starts, np.ones(len(rows), np.float32))
    return assemble(segments, [""] * len(rows), targets, np.zeros(0, np.float32), 1)


@pytest.mark.parametrize("form", ["paper", "chatml", "empty_thought", "spaces"])
def test_log_probabilities_are_those_of_the_packed_forward_pass(form: str, tmp_path: Path) -> None:
    renderer = renderer_of(form, tmp_path / "tokenizer")
    tokenizer = renderer.tokenizer
    folder = save_random_llama(tmp_path / "policy", tokenizer, 0.2, num_key_value_heads=2)
    contexts = [renderer.context([Message("user", text)]) for text in TEXTS]
    requests = [Request(row, 0, context, 40) for row, context in enumerate(contexts)]
    found, model = trainer_model(folder)
    # The engine starts from other weights and gets those of the trainer.
    start = save_random_llama(tmp_path / "start", tokenizer, 0.1, num_key_value_heads=2)
    engine = load(start, tokenizer, renderer.end_ids)
    assert difference(model, requests, engine.complete(requests)) > 0.1
    engine.replace_weights(live_tensors(model, found.model, found.kind))
    assert difference(model, requests, engine.complete(requests)) < 1e-5


def difference(model: Any, requests: Sequence[Request], answers: Sequence[Completion]) -> float:
    """Return the largest difference of a log-probability between trainer and engine."""
    with torch.no_grad():
        nll: Tensor = model(bin_of(requests, answers))
    sampled = torch.tensor([number for answer in answers for number in answer.log_probs])
    assert nll.shape == sampled.shape
    return float((nll + sampled).abs().max())
