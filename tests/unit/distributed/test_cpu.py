"""Patches for the CPU: collectives of one rank, oneDNN's kernel cache, and the number of threads."""

import os
from typing import Any

import pytest
import torch

from offline_align.distributed import cpu
from offline_align.distributed.setup import _cores


@pytest.mark.parametrize(
    ("ranks", "in_place", "called"), [(1, True, False), (1, False, True), (2, True, True), (2, False, True)]
)
def test_only_in_place_collectives_of_one_rank_are_skipped(
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


def test_a_collective_on_a_slice_of_its_buffer_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard starts at the address of the buffer, but is shorter."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: 1)
    buffer = torch.arange(4.0)
    assert cpu._unless_alone(lambda *_, **__: "handle")(buffer[:2], buffer) == "handle"


@pytest.mark.parametrize(("given", "kept"), [(None, "32"), ("7", "7")])
def test_the_kernel_cache_is_limited_unless_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    cpu._limit_kernel_cache()
    assert os.environ[name] == kept


def test_a_job_uses_the_cores_that_it_was_allotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two jobs on a shared node would each start a thread for every core."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert _cores() == 8
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert _cores() == 3
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    assert _cores() == 8
