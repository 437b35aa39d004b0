"""The norm on the CPU against torch's, and its gradient against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from offline_align.model.norm import rms_norm

EPS = 1e-5


def given(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 1, 12, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(12, generator=generator, dtype=dtype).requires_grad_()
    return x, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_has_torchs_bits(dtype: torch.dtype) -> None:
    x, weight = given(dtype)
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (12,), weight, EPS))


def test_gradients_in_fp64() -> None:
    x, weight = given(torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, EPS), (x, weight))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-5)])
def test_gradients_are_those_of_torch(dtype: torch.dtype, allowed: float) -> None:
    x, weight = given(dtype)
    direction = torch.randn(7, 1, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    ours = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), direction)
    theirs = torch.autograd.grad(F.rms_norm(x, (12,), weight, EPS), (x, weight), direction)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype is other.dtype is dtype
        assert torch.allclose(mine, other, atol=allowed)
