"""Split fp32 weights into bf16 weights and 16-bit remainders, as Transformer Engine's Adam stores them.

The bf16 weight is the nearest one; a tie goes to the larger magnitude. The remainder is the signed
distance to it, in units in the last place of fp32.
"""

import torch
from torch import Tensor


def part(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 weight into a bf16 weight and an int16 remainder, both of the shape of `weight`."""
    bits = weight.contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)
    return ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16), remainder


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the exact fp32 weight that `part` has split."""
    bits = (weight.detach().contiguous().view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)
