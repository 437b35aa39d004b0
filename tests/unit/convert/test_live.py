"""The Hugging Face tensors of a built model are those of its export, without a file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.convert.architecture import read_architecture
from offline_align.convert.export import huggingface_tensors
from offline_align.convert.live import live_tensors
from offline_align.convert.load import load_huggingface

Save = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    from offline_align.distributed.setup import session

    with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)):
        yield


def built(folder: Path, bf16: bool = False) -> tuple[Any, Any]:
    """Return the architecture of a folder, and our model with its weights."""
    from offline_align.model.build import build_model

    found = read_architecture(folder)
    model = build_model(found.kind, found.model, ParallelSection(), torch.device("cpu"), bf16)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_huggingface(folder):
            if name in parameters:
                parameters[name].copy_(tensor)
    return found, model


def test_tensors_are_those_of_the_folder(save_model: Save, read_tensors: Read, family: str) -> None:
    folder = save_model(family)
    found, model = built(folder)
    given = list(live_tensors(model, found.model, found.kind))
    expected = read_tensors(folder)
    assert sorted(name for name, _ in given) == sorted(expected)
    for name, tensor in given:
        assert torch.equal(tensor, expected[name]), name


def test_shards_of_two_ranks_give_the_tensors_of_the_folder(save_model: Save, read_tensors: Read, family: str) -> None:
    folder = save_model(family)
    found = read_architecture(folder)
    first, second = (dict(load_huggingface(folder, rank, 2)) for rank in range(2))
    name_of = {id(tensor): name for name, tensor in first.items()}
    given = huggingface_tensors(
        first.items(), found.model, found.kind, lambda shard: [shard, second[name_of[id(shard)]]]
    )
    expected = read_tensors(folder)
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in given)
    assert not expected


def test_logits_are_those_of_the_folder_to_the_bit(save_model: Save) -> None:
    folder = save_model("llama_tied")
    found, model = built(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    empty = transformers.AutoModelForCausalLM.from_config(loaded.config).eval()
    tokens = torch.tensor([[7, 5, *range(30, 52), 2]])
    with torch.no_grad():
        assert not torch.equal(empty(tokens).logits, loaded(tokens).logits)
        for name, tensor in live_tensors(model, found.model, found.kind):
            empty.get_parameter(name).copy_(tensor)
        assert torch.equal(empty(tokens).logits, loaded(tokens).logits)


def test_a_reward_model_keeps_its_head_in_fp32(save_model: Save, read_tensors: Read) -> None:
    folder = save_model("qwen3", "ForSequenceClassification")
    found, model = built(folder, bf16=True)
    given = dict(live_tensors(model, found.model, found.kind, torch.bfloat16))
    expected = read_tensors(folder)
    assert torch.equal(given.pop("score.weight"), expected.pop("score.weight"))
    assert {name: tensor.dtype for name, tensor in given.items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in given.items())


def test_what_needs_no_cut_is_not_copied(save_model: Save) -> None:
    found, model = built(save_model("llama"))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    given = dict(live_tensors(model, found.model, found.kind))
    copied = {name.split(".")[-2] for name, tensor in given.items() if tensor.data_ptr() not in own}
    # The rows of queries, keys and values are interleaved; the up projection is the second half of a weight.
    assert copied == {"q_proj", "k_proj", "v_proj", "up_proj"}
