"""Which numbers a forward pass has, by what was asked for and the device."""

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
        # Linear layers multiply in fp8, everything else is bf16.
        ("fp8", "cuda", True),
    ],
)
def test_precision(precision: str, device: str, bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert uses_bf16(Precision(precision), torch.device(device)) is bf16
    assert ("emulate it" in caplog.text) is ((precision, device) == ("bf16", "cpu"))
