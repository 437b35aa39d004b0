"""What a rank is started with."""

import os

import pytest

from offline_align.config.sections import ParallelSection
from offline_align.launch import set_cuda_environment

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")


@pytest.mark.parametrize(
    ("tensor", "given", "expected"),
    [
        (1, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (4, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (4, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (4, {"PYTORCH_ALLOC_CONF": "", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {}),
    ],
)
def test_a_layout_sets_what_cuda_is_to_do_and_the_user_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, tensor: int, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    set_cuda_environment(ParallelSection(tensor_model_parallel_size=tensor))
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == given | expected
