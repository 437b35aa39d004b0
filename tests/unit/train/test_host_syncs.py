"""The number of reads of tensor values in training, validation and labelling; each synchronises with a GPU."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from offline_align.config.sections import ModelSection, OptimSection, ParallelSection, RunSection
from offline_align.data.bins import SampleSource
from offline_align.data.loader import Loader
from offline_align.data.tokenize import TokenizedRows
from offline_align.distributed.setup import Ranks, session
from offline_align.distributed.stopping import StopRequest, StopVote
from offline_align.errors import StoppedEarly

WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
MODEL = ModelSection(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=90)
LENGTHS = [3, 17, 9, 16, 2, 40, 41, 5]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls that read a tensor's value on the host."""
    counts: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Boundaries of segments are int32. Only the attention on the CPU reads them on the host.
            counts[name] += tensor.dtype is not torch.int32
            return method(tensor, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return counts


def source() -> SampleSource:
    ids = np.arange(sum(LENGTHS), dtype=np.int32) % 90
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    names, weights = [str(n) for n in LENGTHS], np.ones(len(LENGTHS), np.float32)
    return SampleSource(TokenizedRows(ids, offsets, np.ones(len(LENGTHS), np.int32), weights, names, {}, 0))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_waits_twice(ranks: Ranks, waits: Counter[str], micro_batches: int) -> None:
    from offline_align.model.build import build_model
    from offline_align.objectives.next_token import next_token
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    parallel = ParallelSection()
    model = wrap_model(build_model("policy", MODEL, parallel, ranks.device, False), parallel, False)
    step = TrainStep(model, build_optimizer(model, OptimSection(), parallel, False, False), next_token, 1.0)
    capacity = sum(LENGTHS) // micro_batches + (0 if micro_batches == 1 else 8)
    data = Loader(source(), len(LENGTHS), len(LENGTHS), capacity, 0, 0, 1).step(0)
    assert len(data.micro_batches) == micro_batches
    step(data.micro_batches, 1e-3)
    waits.clear()
    result = step(data.micro_batches, 1e-3)
    # One read is for the gradient norm, for clipping, and one for the sums that are logged.
    assert result.applied
    assert sum(waits.values()) <= 2, waits


@pytest.mark.parametrize("voting", [False, True])
def test_scores_are_asked_for_once_a_bin_when_the_next_is_launched(
    ranks: Ranks, waits: Counter[str], voting: bool
) -> None:
    from offline_align.label.scoring import score_bins
    from offline_align.model.build import build_model

    model: Any = build_model("reward_model", MODEL, ParallelSection(), ranks.device, False).eval()
    bins = [[0, 1], [2], [3, 4, 5], [6], [7]]
    stops = {"stops": StopVote(StopRequest(), ranks)} if voting else {}
    at_launch: list[int] = []
    model.register_forward_pre_hook(lambda *_: at_launch.append(sum(waits.values())))
    waits.clear()
    scored = list(score_bins(model, source(), bins, ranks, **stops))
    assert [[row for row, _ in scores] for scores in scored] == bins
    # One read for the scores of a bin, and one for the stop vote after it.
    each = 2 if voting else 1
    assert at_launch == [0, *(each * n for n in range(len(bins) - 1))]
    assert sum(waits.values()) <= each * len(bins), waits


def test_bins_without_rows_are_not_computed_and_after_a_stop_none_is(ranks: Ranks) -> None:
    from offline_align.label.scoring import score_bins
    from offline_align.model.build import build_model

    model: Any = build_model("reward_model", MODEL, ParallelSection(), ranks.device, False).eval()
    launched: list[tuple[str, ...]] = []
    model.register_forward_pre_hook(lambda _, batch: launched.append(batch[0].row_ids))
    answers = iter([False, False, False, True])
    scored = list(score_bins(model, source(), [[0], [], [1, 2], [3], [4], [5]], ranks, lambda: next(answers)))
    assert launched == [("3",), ("17", "9"), ("16",)]
    assert [[row for row, _ in scores] for scores in scored] == [[0], [], [1, 2], [3]]


def test_a_validation_asks_once_a_share_and_leaves_nothing_behind(
    ranks: Ranks, waits: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_align.train import trainer

    monkeypatch.setattr(trainer, "_VALIDATION_ROWS", 2)
    count = len(LENGTHS)
    run: Any = SimpleNamespace(ranks=ranks, saver=SimpleNamespace(seconds=0.0), _pinned=False)
    run.validation, run._stopped = Loader(source(), count, count, 64, 0, 0, 1), lambda stop: StoppedEarly(stop.reason)
    stop = StopRequest(max_seconds=1000)
    shares = trainer.Trainer._validation_batches(run, stop)
    found = [[row for batch in next(shares) for row in batch.row_ids] for _ in range(2)]
    assert found == [["17", "3"], ["16", "9"]]
    assert sum(waits.values()) == len(found), waits
    stop.expect(2000)
    # The variable keeps the error, and its traceback the frames, so nothing is cleaned up by chance.
    with pytest.raises(StoppedEarly) as stopped:
        next(shares)
    assert str(stopped.value) == "trainer.max_time"
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_waits_are_seen(waits: Counter[str]) -> None:
    value = torch.ones(2)
    float(value[0]), bool(value[1] > 0), value.tolist()
    assert sum(waits.values()) >= 3
