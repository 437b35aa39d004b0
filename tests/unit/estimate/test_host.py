"""This machine as a device: which entry of the table a GPU is, and the timed product."""

import time
from pathlib import Path

import numpy as np
import pytest

from offline_align.estimate import host
from offline_align.estimate.hardware import NODES
from offline_align.estimate.host import Gpu


@pytest.mark.parametrize(
    ("name", "memory", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 85_045_870_592, "h100_80gb"),
        ("NVIDIA H200", 150_754_820_096, "h200_141gb"),
        ("NVIDIA A100-SXM4-40GB", 42_298_834_944, "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", 84_974_239_744, "a100_80gb"),
        ("NVIDIA H100 NVL", 100_000_000_000, None),
        ("NVIDIA GeForce RTX 4090", 25_000_000_000, None),
    ],
)
def test_a_gpu_is_found_by_name_and_memory(name: str, memory: float, kind: str | None) -> None:
    assert Gpu(name, memory).node == (NODES[kind] if kind else None)


def test_a_machine_without_device_files_has_no_gpu() -> None:
    if [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("dxg")]:
        pytest.skip("this machine has a GPU")
    assert host.first_gpu() is None


def test_the_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.3])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(np, "matmul", lambda left, right: None)
    host.product_flops.cache_clear()
    try:
        assert host.product_flops() == pytest.approx(2 * 1024**3 / 0.1)
    finally:
        host.product_flops.cache_clear()
