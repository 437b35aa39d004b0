"""The same weights give the same numbers in megatron-core and in transformers."""

from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.config.sections import Device, ParallelSection, RunSection
from offline_align.convert.architecture import read_architecture
from offline_align.convert.check import Difference, packed
from offline_align.convert.load import load_huggingface

Save = Callable[..., Path]
EOS = 2
# Longer than the sliding windows of the tiny models, of different lengths; end of sequence comes last.
ROWS = [[7, 5, *range(30, 52), EOS], [9, 8, 250, 300, EOS], [*range(100, 140), EOS]]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    from offline_align.distributed.setup import session

    with session(ParallelSection(), RunSection(dir="unused", device=Device.cpu)):
        yield


def megatron_model(folder: Path) -> Any:
    from offline_align.model.build import build_model

    found = read_architecture(folder)
    model = build_model(found.kind, found.model, ParallelSection(), torch.device("cpu"), bf16=False)
    loaded = model.load_state_dict(dict(load_huggingface(folder)), strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if not name.endswith("_extra_state")]
    return model.eval()


def test_logits_are_those_of_transformers(save_model: Save, family: str) -> None:
    folder = save_model(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits[0] for row in ROWS])
        found = megatron_model(folder).logits(packed(ROWS))[:, : expected.shape[1]]
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rewards_are_those_of_transformers(save_model: Save, family: str, side: str) -> None:
    folder = save_model(family, "ForSequenceClassification")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, pad_token_id=1
    ).eval()
    width = max(map(len, ROWS))
    padded, mask = [], []
    for row in ROWS:
        pad = [1] * (width - len(row))
        padded.append(row + pad if side == "right" else pad + row)
        real = [1] * len(row)
        mask.append(real + [0] * len(pad) if side == "right" else [0] * len(pad) + real)
    with torch.no_grad():
        expected = theirs(torch.tensor(padded), attention_mask=torch.tensor(mask)).logits[:, 0]
        found = megatron_model(folder)(packed(ROWS))
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("largest", "scale", "passes"),
    [
        (9e-5, 0.5, True),
        (2e-4, 0.5, False),
        (2e-4, 3.0, True),
        (nan, 1.0, False),
        (nan, nan, False),
        (inf, inf, False),
        (inf, 1.0, False),
    ],
)
def test_numbers_that_are_not_finite_are_never_the_same(largest: float, scale: float, passes: bool) -> None:
    assert Difference("logits", largest, scale, tokens=1).passes is passes
