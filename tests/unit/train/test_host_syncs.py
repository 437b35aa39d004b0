"""How often a step asks for a value of a tensor: on a GPU each of them waits for all work before it."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from offline_align.config.sections import ModelSection, OptimSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.loader import Loader
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import Ranks, session

WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
MODEL = ModelSection(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=90)
LENGTHS = [3, 17, 9, 16, 2, 40, 41, 5]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls that wait for a tensor's value."""
    counts: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Bounds of segments: the attention on the CPU goes by them, that on CUDA leaves them on the device.
            counts[name] += tensor.dtype is not torch.int32
            return method(tensor, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return counts


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_waits_twice(ranks: Ranks, waits: Counter[str], micro_batches: int) -> None:
    from offline_align.model.build import build_model
    from offline_align.objectives.next_token import next_token
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    ids = np.arange(sum(LENGTHS), dtype=np.int32) % 90
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    names, weights = [str(n) for n in LENGTHS], np.ones(len(LENGTHS), np.float32)
    source = SampleSource(TokenizedRows(ids, offsets, np.ones(len(LENGTHS), np.int32), weights, names, {}, 0))
    parallel = ParallelSection()
    model = wrap_model(build_model("policy", MODEL, parallel, ranks.device, False), parallel, False)
    step = TrainStep(model, build_optimizer(model, OptimSection(), parallel, False, False), next_token, 1.0)
    capacity = sum(LENGTHS) // micro_batches + (0 if micro_batches == 1 else 8)
    data = Loader(source, len(LENGTHS), len(LENGTHS), capacity, 0, 0, 1).step(0)
    assert len(data.micro_batches) == micro_batches
    step(data.micro_batches, 1e-3)
    waits.clear()
    result = step(data.micro_batches, 1e-3)
    # One for the gradient's norm, which decides on clipping, and one for the sums that are logged.
    assert result.applied
    assert sum(waits.values()) <= 2, waits


def test_waits_are_seen(waits: Counter[str]) -> None:
    value = torch.ones(2)
    float(value[0]), bool(value[1] > 0), value.tolist()
    assert sum(waits.values()) >= 3
