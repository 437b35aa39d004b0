"""A weight in fp32 as one in bf16 and the 16 bits that it lacks, as Transformer Engine's Adam keeps them.

The weight in bf16 is the nearest one, the larger in magnitude of two that are as near; the remainder is the signed
distance to it, in units of the last place of fp32.
"""

import torch
from torch import Tensor


def part(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight in bf16 and its remainder in int16, both in the shape of `weight`, which is in fp32."""
    bits = weight.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)
    return ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16), remainder


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the weight in fp32, to the bit."""
    bits = (weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)
