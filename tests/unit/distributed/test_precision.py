"""The precision of a forward pass, by setting and device."""

import pytest
import torch

from offline_align.config.sections import Precision
from offline_align.distributed.setup import uses_bf16


@pytest.mark.parametrize(
    ("precision", "device", "bf16"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("bf16", "cpu", True),
        ("bf16", "cuda", True),
        ("fp32", "cpu", False),
        ("fp32", "cuda", False),
        # Linear layers multiply in fp8; everything else is bf16.
        ("fp8", "cuda", True),
    ],
)
def test_precision(precision: str, device: str, bf16: bool) -> None:
    assert uses_bf16(Precision(precision), torch.device(device)) is bf16


@pytest.mark.parametrize(
    ("capabilities", "warns"),
    [({"avx512_bf16": True}, False), ({"amx_bf16": True}, False), ({"avx512_bf16": False}, True), ({}, True)],
)
def test_bf16_on_a_cpu_without_units_for_it(
    capabilities: dict[str, bool], warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert uses_bf16(Precision.bf16, torch.device("cpu"))
    assert ("no bf16 units" in caplog.text) is warns


def test_a_torch_without_get_capabilities(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert uses_bf16(Precision.bf16, torch.device("cpu"))
    assert "no bf16 units" in caplog.text
