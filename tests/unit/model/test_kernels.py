"""Triton kernels against torch's operations, in Triton's interpreter; `tests/gpu` runs them on a GPU."""

import os
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.harness import apart
from tests.preloaded import python

DTYPES = {"fp32": (torch.float32, 1e-6), "bf16": (torch.bfloat16, 1e-2)}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the interpreter for child processes; Triton reads the variable when a kernel is defined."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # The tolerances are for as many threads as a new interpreter has.
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    monkeypatch.setattr(spawn, "_python_exe", python(TRITON_INTERPRET="1", OMP_NUM_THREADS=threads).encode())


def heads(device: str, precision: str, groups: int, each: int, width: int) -> list[float]:
    """Return relative errors against torch of query, key, value and the gradient of the projection."""
    from offline_align.model.rotary import rotate
    from offline_align.model.self_attention import _SplitHeads

    torch.manual_seed(0)
    mixed = torch.randn(5, groups * (each + 2) * width, device=device).to(DTYPES[precision][0]).requires_grad_()
    angles = torch.randn(5, 1, width // 2, device=device)
    turn = angles.cos().to(mixed.dtype), angles.sin().to(mixed.dtype)
    grads = [torch.randn(5, n, width, device=device).to(mixed.dtype) for n in (groups * each, groups, groups)]
    found = _SplitHeads.apply(mixed, *turn, groups)  # type: ignore[no-untyped-call]
    whole = mixed.float().view(5, groups, -1)
    query, key, value = torch.split(whole, [each * width, width, width], dim=-1)
    turns = [t.float() for t in turn]
    expected = (rotate(query.reshape(5, -1, width), *turns), rotate(key, *turns), value)
    (gradient,) = torch.autograd.grad(found, mixed, grads)
    (right,) = torch.autograd.grad(expected, mixed, [g.float() for g in grads])
    assert not any(t.untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr() for t in found)
    return [_distance(a, b) for a, b in zip((*found, gradient), (*expected, right), strict=True)]


def vocabulary(device: str, precision: str, kept_bytes: int, num_tokens: int) -> list[float]:
    """Return relative errors of likelihoods and of their gradients, with a padded vocabulary."""
    from offline_align.model import vocabulary as module

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    patched: Any = module
    patched.has_kernels, patched.LOGITS_KEPT_BYTES = lambda _: True, kept_bytes
    patched.LOGITS_PIECE_BYTES = dict.fromkeys(("cpu", "cuda"), 4 * 5000 * 4)
    torch.manual_seed(0)
    dtype = DTYPES[precision][0]
    hidden, weight = (torch.randn(n, 16, device=device).to(dtype).requires_grad_() for n in (9, 5000))
    ids, weights = torch.randint(0, num_tokens, (9,), device=device), torch.rand(9, device=device)
    nll = module.target_nll(hidden, weight, ids, dist.group.WORLD, num_tokens)
    found = (nll, *torch.autograd.grad((nll * weights).sum(), (hidden, weight)))
    logits = (hidden @ weight.t()).float()[:, :num_tokens]
    right = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    expected = (right, *torch.autograd.grad((right * weights).sum(), (hidden, weight)))
    return [_distance(a, b) for a, b in zip(found, expected, strict=True)]


def rows_of_other_ranks() -> list[list[float]]:
    """Return sums and targets of logits for targets of other ranks, and for rows that are all padding."""
    from offline_align.model import kernels

    logits = torch.stack((torch.arange(50.0), torch.arange(50.0), torch.full((50,), torch.finfo(torch.float32).min)))
    return [t.tolist() for t in kernels.log_sum(logits, torch.tensor([-3, 50, 7]))]


def whole_model(kind: str) -> float:
    """Return how far outputs and gradients of a small model with kernels are from those without."""
    from benchmarks.gpu_ours import outputs
    from offline_align.config.sections import Device
    from offline_align.model import backend, self_attention
    from offline_align.model import vocabulary as head

    without = outputs(kind, [7, 30, 12], Device.cpu, False, "torch")
    assert not backend.has_kernels(torch.empty(0))
    patched: Any
    for patched in (self_attention, head):
        patched.has_kernels = lambda _: True
    found = outputs(kind, [7, 30, 12], Device.cpu, False, "torch")
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(found, without, strict=True))


def sizes_of_machine_code() -> list[int]:
    """Return the bytes of each kernel compiled for an H100; compiling needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from offline_align.model import kernels

    heads_of_8b = {"each": 4, "groups": 8, "width": 128, "slots": 64, "lanes": 64}
    halves = dict.fromkeys(("mixed", "query", "key", "value", "cosine", "sine"), "*bf16")
    row = {"logits": "*bf16", "local": "*i64", "vocabulary": "i32"}
    asked: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (kernels._heads_kernel, halves, heads_of_8b | {"joins": False}),
        (kernels._heads_kernel, halves, heads_of_8b | {"joins": True}),
        (kernels._log_sum_kernel, row | {"sums": "*fp32", "target": "*fp32"}, {"block": 4096}),
        (kernels._residual_kernel, row | {"log_sums": "*fp32"}, {"block": 4096}),
    ]
    found = []
    for kernel, types, constants in asked:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        found.append(len(built.asm["cubin"]))
    return found


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("groups", "each", "width"), [(2, 3, 16), (1, 4, 12), (3, 1, 64)])
def test_heads_are_split_and_turned(precision: str, groups: int, each: int, width: int) -> None:
    assert max(apart(heads, "cpu", precision, groups, each, width)) < DTYPES[precision][1]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_likelihoods_and_their_gradients(precision: str, kept_bytes: int) -> None:
    assert max(apart(vocabulary, "cpu", precision, kept_bytes, 4900)) < DTYPES[precision][1]


def test_targets_of_other_ranks_count_nothing() -> None:
    (*sums, nothing), targets = apart(rows_of_other_ranks)
    assert sums == pytest.approx([float(torch.arange(50.0).logsumexp(0))] * 2)
    # A rank without real tokens contributes nothing to the sums of the other ranks.
    assert nothing == -float("inf")
    assert targets[:2] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
def test_a_model_with_kernels_is_the_model_without(kind: str) -> None:
    assert apart(whole_model, kind) < 1e-5


def test_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter accepts code that the compiler refuses, so the kernels are compiled too."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert len(sizes := apart(sizes_of_machine_code)) == 4
    assert min(sizes) > 1000
