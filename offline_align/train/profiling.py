"""Profiling of a few steps, with torch's profiler or Nsight Systems."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from offline_align.errors import StoppedEarly

FOLDER = "profile"
# `nsys profile` sets this variable in the processes that it profiles.
_UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"

logger = logging.getLogger(__name__)
_abandoned: list[contextlib.ExitStack] = []


class StepProfiler:
    """Profiles a range of optimizer steps of one rank.

    `steps` is the first and the last step, counted from 1; if it is empty, nothing is profiled. Under
    `nsys profile --capture-range=cudaProfilerApi`, this opens and closes the capture range and emits an
    NVTX range for every operator. Otherwise torch's profiler writes `profile/rank_R_steps_A_B.json`,
    which Perfetto and TensorBoard read.
    """

    def __init__(self, steps: Sequence[int], run_dir: Path, rank: int) -> None:
        self._first, self._last = (steps[0], steps[1]) if steps else (0, 0)
        self._trace = run_dir / FOLDER / f"rank_{rank}_steps_{self._first}_{self._last}.json"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if error is None or isinstance(error, StoppedEarly):
            self._open.close()
        else:
            # On a GPU, stopping the profiler waits for all kernels. After an error, a collective's
            # kernel may wait forever for ranks that are gone. The reference is kept because dropping
            # the last one would stop the profiler too.
            _abandoned.append(self._open.pop_all())

    def before(self, step: int) -> None:
        """Start the profiler if `step`, counted from 1, is the first one to profile."""
        if self._first and step == self._first:
            self._open.enter_context(_nsys_range() if _UNDER_NSYS in os.environ else _torch_trace(self._trace))

    def after(self, step: int) -> None:
        """Stop the profiler and write its trace if `step` is the last one to profile."""
        if step == self._last:
            self._open.close()


@contextlib.contextmanager
def _torch_trace(path: Path) -> Iterator[None]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    logger.info("profile: %s", path)


@contextlib.contextmanager
def _nsys_range() -> Iterator[None]:
    # torch has no types for these.
    profiler: Any = torch.cuda.profiler
    autograd: Any = torch.autograd.profiler
    profiler.start()
    try:
        with autograd.emit_nvtx():
            yield
    finally:
        profiler.stop()
