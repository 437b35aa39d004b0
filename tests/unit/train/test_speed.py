"""Rates and times against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

from offline_align.config.sections import ModelSection
from offline_align.data.loader import StepData
from offline_align.estimate.sizes import model_sizes
from offline_align.train import speed
from offline_align.train.speed import OwnTime, SpeedMeter, peak_memory_bytes, stragglers

SIZES = model_sizes(
    ModelSection(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2, vocab_size=10
    ),
    10,
)
# Rows of 3 and 5 tokens, and 2 tokens of padding.
DATA = StepData([], num_rows=2, num_tokens=8, num_padding=2, squared_lengths=34, num_read=4)
# A pair, whose head reads the last tokens of both answers.
PAIR = replace(DATA, num_rows=1, num_read=2)


def meter(scalar_head: bool = False, device: str = "cpu", reads_everywhere: bool = False) -> SpeedMeter:
    return SpeedMeter(replace(SIZES, scalar_head=scalar_head), reads_everywhere, torch.device(device), world_size=4)


def test_only_tokens_of_rows_count() -> None:
    values = meter().step(DATA, 0.5, 0.1)
    assert values["tokens_per_second"] == 16
    assert values["tokens_per_second_per_rank"] == 4
    assert values["padding_fraction"] == 0.2
    assert (values["step_seconds"], values["data_seconds"]) == (0.5, 0.1)
    assert "mfu" not in values


def test_both_conventions_of_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(speed, "peak_memory_bytes", lambda _: 0)
    values = meter(device="cuda").step(DATA, 0.5, 0.0)
    available = 0.5 * 989e12 * 4
    assert values["mfu"] == pytest.approx(SIZES.train_flops(8, 34, 4, 4) / available)
    assert values["mfu_full_attention"] == pytest.approx(SIZES.train_flops(8, 68, 8, 8) / available)
    pair = meter(True, "cuda").step(PAIR, 0.5, 0.0)
    assert pair["mfu"] == pytest.approx(SIZES.train_flops(8, 34, 0, 2) / available)
    whole = meter(True, "cuda", reads_everywhere=True).step(PAIR, 0.5, 0.0)
    assert whole["mfu"] == pytest.approx(SIZES.train_flops(8, 34, 0, 8) / available)


def test_summary_of_many_steps() -> None:
    counted = meter()
    for seconds in [*[1.0] * 18, 2.0, 3.0]:
        counted.step(DATA, seconds, 0.1)
    summary = counted.summary()
    assert summary["step_seconds_median"] == 1.0
    assert summary["step_seconds_p95"] == pytest.approx(2.05)
    assert summary["tokens_per_second"] == pytest.approx(20 * 8 / 23)
    assert summary["waiting_for_data_fraction"] == pytest.approx(2 / 23)
    assert meter().summary() == {}


def test_memory_on_the_cpu_is_what_the_process_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= max(before, block.numel())


def test_the_slowest_rank_is_named_with_its_host() -> None:
    found = stragglers([1.0, 1.5, 1.0, 1.25], ["n1", "n1", "n2", "n2"])
    assert found == {
        "rank_seconds_median": 1.125,
        "rank_seconds_max": 1.5,
        "slowest_rank": 1,
        "slowest_host": "n1",
    }


@pytest.mark.parametrize("seconds", [[1.0], [0.0, 0.0], []])
def test_nothing_is_compared_before_the_second_step_or_alone(seconds: list[float]) -> None:
    assert stragglers(seconds, ["n1"] * len(seconds)) == {}


def test_own_time_is_that_between_the_marks_and_the_wait_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5])
    monkeypatch.setattr("offline_align.train.speed.time.monotonic", lambda: next(times))
    own = OwnTime(torch.device("cpu"))
    assert own.seconds() == 0.0
    own.start(0.25)
    own.stop()
    assert own.seconds() == 2.75
