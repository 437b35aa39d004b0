"""A bf16 model on the CPU is close to the same model in fp32, and computes attention in fp32."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch

from offline_align.config.sections import ModelSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import Ranks, session

MODEL = ModelSection(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=90
)
LENGTHS = [3, 17, 9, 40]
# bf16 has 8 significant bits, so each rounding has a relative error of at most 2**-9, and a forward
# pass has some dozen roundings in sequence.
ALLOWED = 2.0**-5


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


def _batch() -> Any:
    ids = np.random.Generator(np.random.PCG64(1)).integers(0, 90, sum(LENGTHS)).astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    starts, weights = np.ones(len(LENGTHS), np.int32), np.ones(len(LENGTHS), np.float32)
    rows = TokenizedRows(ids, offsets, starts, weights, [str(n) for n in LENGTHS], {}, 0)
    return SampleSource(rows).collate(range(len(LENGTHS)), 1)


def test_outputs_and_gradients_are_near_those_of_fp32(ranks: Ranks) -> None:
    from offline_align.model.build import build_model

    rounded, exact = (build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=b) for b in (True, False))
    exact.load_state_dict({n: t.float() for n, t in rounded.state_dict().items() if torch.is_tensor(t)}, strict=False)
    found = {}
    for name, model in (("rounded", rounded), ("exact", exact)):
        nll = model(_batch())
        assert nll.dtype is torch.float32
        nll.sum().backward()
        found[name] = (nll, {n: p.grad for n, p in model.named_parameters()})
    assert torch.allclose(found["rounded"][0], found["exact"][0], rtol=ALLOWED)
    for name, gradient in found["exact"][1].items():
        other = found["rounded"][1][name]
        assert other.dtype is torch.bfloat16
        assert (other.float() - gradient).norm() < ALLOWED * gradient.norm(), name


@pytest.mark.parametrize(("trains", "name"), [(True, "attend_by_products"), (False, "F.scaled_dot_product_attention")])
def test_attention_is_in_fp32(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, trains: bool, name: str) -> None:
    from offline_align.model import attention
    from offline_align.model.build import build_model

    seen = set()
    attend = attrgetter(name)(attention)

    def watched(query: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.add(query.dtype)
        found: torch.Tensor = attend(query, *rest, **named)
        return found

    monkeypatch.setattr(f"offline_align.model.attention.{name}", watched)
    model = build_model("reward_model", MODEL, ParallelSection(), ranks.device, bf16=True)
    with torch.set_grad_enabled(trains):
        assert model(_batch()).shape == (len(LENGTHS),)
    assert seen == {torch.float32}
