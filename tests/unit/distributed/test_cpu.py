"""Collectives on the CPU: a rank that is alone keeps what it has, and nothing else is left out."""

from typing import Any

import pytest
import torch

from offline_align.distributed import cpu


@pytest.mark.parametrize(
    ("ranks", "in_place", "called"), [(1, True, False), (1, False, True), (2, True, True), (2, False, True)]
)
def test_only_what_would_copy_onto_itself_is_left_out(
    monkeypatch: pytest.MonkeyPatch, ranks: int, in_place: bool, called: bool
) -> None:
    calls = []

    def collective(*given: Any, **named: Any) -> str:
        calls.append((given, named))
        return "handle"

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: ranks)
    given = torch.arange(4.0)
    output = given if in_place else given.clone()
    found = cpu._unless_alone(collective)(output, given, group="some", async_op=True)
    assert (found == "handle") is called
    assert len(calls) == called
    if called:
        assert calls[0][1] == {"group": "some", "async_op": True}


def test_a_slice_of_a_buffer_is_not_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard begins where the buffer does, and is shorter."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 1)
    buffer = torch.arange(4.0)
    assert cpu._unless_alone(lambda *_, **__: "handle")(buffer[:2], buffer) == "handle"
