"""Outputs and gradients of attention by products against torch's, around the ends of blocks."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, WIDTH = 4, 8


@pytest.fixture
def attend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from offline_align.model import attention_products

    monkeypatch.setattr(attention_products, "_BLOCK", 4)
    attention_products._triangle.cache_clear()
    yield attention_products.attend_by_products
    attention_products._triangle.cache_clear()


def _by_torch(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[list[int], list[int]], scale: float) -> Tensor:
    out = []
    queries, keys, values = (
        torch.split(t, n) for t, n in ((query, lengths[0]), (key, lengths[1]), (value, lengths[1]))
    )
    for q, k, v in zip(queries, keys, values, strict=True):
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [
        ([1], [1]),
        ([3, 4, 5, 8, 9, 17], [3, 4, 5, 8, 9, 17]),
        # Rows with more keys than queries, and a row without queries.
        ([5, 0, 4, 1], [12, 3, 4, 9]),
    ],
)
def test_outputs_and_gradients(attend: Any, groups: int, lengths: tuple[list[int], list[int]]) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = ((sum(lengths[0]), HEADS), (sum(lengths[1]), groups), (sum(lengths[1]), groups), (sum(lengths[0]), HEADS))
    query, key, value, direction = (torch.randn(*s, WIDTH, generator=generator, dtype=torch.float64) for s in shapes)
    given = [t.requires_grad_() for t in (query, key, value)]
    found, expected = (f(query, key, value, lengths, 0.3) for f in (attend, _by_torch))
    assert torch.allclose(found, expected, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out, given, direction) for out in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-12)


@pytest.mark.parametrize("trains", [True, False])
def test_probabilities_are_kept_for_a_gradient_alone(
    attend: Any, monkeypatch: pytest.MonkeyPatch, trains: bool
) -> None:
    softmax, alive = torch.softmax, []
    made: list[weakref.ref[Tensor]] = []

    def watched(*arguments: Any, **named: Any) -> Tensor:
        alive.append(sum(reference() is not None for reference in made))
        found: Tensor = softmax(*arguments, **named)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr("torch.softmax", watched)
    inputs = torch.randn(3, 16, HEADS, WIDTH, requires_grad=trains)
    out = attend(*inputs.unbind(0), ([16], [16]), 0.3)
    # The probabilities of a block are freed once those of the next block exist.
    assert alive == ([0, 1, 2, 3] if trains else [0, 1, 1, 1])
    assert out.requires_grad is trains
