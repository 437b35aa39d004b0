"""The embedding and its gradients against torch's."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from offline_align.config.sections import ParallelSection, RunSection
from offline_align.distributed.setup import Ranks, session
from tests.unit.model.test_shared_prompts import MODEL


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with session(ParallelSection(), RunSection(dir="unused", seed=5)) as found:
        yield found


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.parametrize("bf16", [False, True])
def test_rows_and_gradients(ranks: Ranks, kind: str, bf16: bool) -> None:
    from offline_align.model.build import build_model

    embedding = build_model(kind, MODEL, ParallelSection(), ranks.device, bf16).embedding.word_embeddings
    ids = torch.tensor([[3, 89, 3, 0, 3, 41]])
    given = torch.linspace(-1, 1, 6 * 32).view(1, 6, 32).to(embedding.weight.dtype)
    rows = embedding(ids)
    rows.backward(given)
    expected = embedding.weight.detach().clone().requires_grad_()
    looked_up = F.embedding(ids, expected)
    torch.autograd.backward(looked_up, given)
    assert torch.equal(rows, looked_up)
    assert torch.allclose(embedding.weight.grad, expected.grad, atol=1e-2 if bf16 else 1e-6)
    assert embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 3, 41, 89]


def test_sums_are_kept_in_their_own_precision(ranks: Ranks) -> None:
    """Gradients of micro-batches are summed in fp32; a sum in bf16 would lose the small ones."""
    from offline_align.model.build import build_model

    embedding = build_model("policy", MODEL, ParallelSection(), ranks.device, bf16=True).embedding.word_embeddings
    embedding.weight.main_grad = torch.full(embedding.weight.shape, 1.0)
    ids = torch.tensor([[7]])
    for _ in range(4):
        embedding(ids).backward(torch.full((1, 1, 32), 2.0**-12, dtype=torch.bfloat16))
    assert embedding.weight.grad_added_to_main_grad
    assert torch.equal(embedding.weight.main_grad[7], torch.full((32,), 1 + 2.0**-10))
    assert (embedding.weight.main_grad.sum(1) != 32.0).nonzero().flatten().tolist() == [7]
