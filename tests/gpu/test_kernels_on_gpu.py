"""On a GPU: the Triton kernels and the embedding's gradient against torch's operations."""

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


def added_rows() -> tuple[float, bool]:
    """Return the largest error of an embedding's gradient, and whether two runs give the same bits.

    The error is relative to the CPU. Half of the tokens are the same, as spaces can be in a text.
    """
    from offline_align.model.embedding import _add_rows

    torch.manual_seed(0)
    ids = torch.randint(0, 500, (1, 4096)) * torch.randint(0, 2, (1, 4096))
    grad = torch.randn(1, 4096, 1024).bfloat16()
    expected = _add_rows(torch.zeros(500, 1024), ids, grad)
    first, second = (_add_rows(torch.zeros(500, 1024, device="cuda"), ids.cuda(), grad.cuda()) for _ in range(2))
    return float((first.cpu() - expected).abs().max()), torch.equal(first, second)


def test_gradients_of_an_embedding_are_added_in_the_same_order() -> None:
    far, is_same = apart(added_rows)
    assert far < 1e-3
    assert is_same
