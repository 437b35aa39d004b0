"""Splitting fp32 weights into bf16 weights and remainders."""

import torch

from offline_align.train.remainders import join, part


def test_parts_make_the_weight_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 5000, generator=generator) * 10 ** torch.randint(-20, 20, (3, 5000), generator=generator)
    rounded, remainder = part(weight)
    assert torch.equal(join(rounded, remainder), weight)
    assert rounded.shape == remainder.shape == weight.shape


def test_the_weight_in_bf16_is_the_nearest() -> None:
    weight = torch.randn(10000, generator=torch.Generator().manual_seed(4))
    rounded, _ = part(weight)
    assert torch.equal(rounded, weight.bfloat16())


def test_of_two_as_near_it_is_the_larger() -> None:
    """torch rounds to even; the kernel rounds up if the first bit of the remainder is set."""
    between = torch.tensor([1 + 2**-8, -1 - 2**-8])
    rounded, remainder = part(between)
    assert rounded.tolist() == [1 + 2**-7, -1 - 2**-7]
    assert remainder.tolist() == [-(2**15)] * 2
    assert between.bfloat16().tolist() == [1.0, -1.0]
