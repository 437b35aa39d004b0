"""On a GPU: the Triton kernels against torch's operations."""

import pytest
import torch

from benchmarks.harness import apart
from tests.unit.model.test_kernels import DTYPES, heads, vocabulary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("groups", "each", "width"), [(2, 3, 16), (1, 4, 96), (8, 4, 128)])
def test_heads_are_split_and_turned(precision: str, groups: int, each: int, width: int) -> None:
    assert max(apart(heads, "cuda", precision, groups, each, width)) < DTYPES[precision][1]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_likelihoods_and_their_gradients(precision: str, kept_bytes: int) -> None:
    assert max(apart(vocabulary, "cuda", precision, kept_bytes, 4900)) < DTYPES[precision][1]
