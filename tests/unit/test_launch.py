"""Environment variables that are set for ranks."""

import os
import subprocess
import sys

import pytest

from offline_align.config.sections import ParallelSection
from offline_align.launch import set_cuda_environment, set_openmp_environment

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
def test_the_layout_sets_cuda_variables_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, tensor: int, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    set_cuda_environment(ParallelSection(tensor_model_parallel_size=tensor))
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == given | expected


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_NUM_THREADS": "2"}, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
        ({"GOMP_SPINCOUNT": "infinite"}, {}),
    ],
)
def test_idle_openmp_threads_sleep_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], added: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    set_openmp_environment()
    assert os.environ == given | added


def test_openmp_is_set_up_before_torch_is_imported() -> None:
    """libgomp reads its settings when it is loaded."""
    look = "import sys; from offline_align import launch; set_up = launch.set_openmp_environment\n"
    look += "launch.set_openmp_environment = lambda: (print('torch' in sys.modules), set_up())\n"
    look += "from offline_align.__main__ import run; run(['verify', 'run.dir=nowhere'])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
