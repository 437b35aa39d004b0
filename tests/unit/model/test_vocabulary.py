"""The fused output layer and cross-entropy against torch's two operations."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from offline_align.model import vocabulary
from offline_align.model.vocabulary import target_nll


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16).to(dtype).requires_grad_()
    weight = torch.randn(50, 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 50, (37,)), torch.rand(37)


@pytest.mark.parametrize("rows", [1, 10, 37])
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_torchs(
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    kept_bytes: int,
    dtype: torch.dtype,
    close: float,
) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_PIECE_BYTES", {"cpu": rows * 4 * 50})
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT_BYTES", kept_bytes)
    hidden, weight, ids, weights = tensors(dtype)
    nll = target_nll(hidden, weight, ids, group, 50)
    assert nll.dtype is torch.float32
    ours = torch.autograd.grad((nll * weights).sum(), (hidden, weight))
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    theirs = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    assert torch.allclose(nll, expected, atol=close, rtol=close)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.float(), other.float(), atol=close, rtol=close)


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_rows_that_pad_the_vocabulary_have_no_probability(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_KEPT_BYTES", kept_bytes)
    hidden, weight, ids, _ = tensors(torch.float32)
    nll = target_nll(hidden, weight, ids % 33, group, 33)
    ours = torch.autograd.grad(nll.sum(), (hidden, weight))
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:33].t(), ids % 33, reduction="none")
    theirs = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert torch.allclose(nll, expected, atol=1e-5)
    assert not ours[1][33:].any()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)


def test_no_target_gives_no_loss_and_no_gradient(group: dist.ProcessGroup) -> None:
    hidden, weight, ids, _ = tensors(torch.float32)
    nll = target_nll(hidden[:0], weight, ids[:0], group, 50)
    assert nll.shape == (0,)
    (gradient,) = torch.autograd.grad(nll.sum(), (weight,))
    assert not gradient.any()


def test_evaluation_keeps_no_logits(group: dist.ProcessGroup) -> None:
    hidden, weight, ids, _ = tensors(torch.float32)
    with torch.inference_mode():
        assert not target_nll(hidden, weight, ids, group, 50).requires_grad
