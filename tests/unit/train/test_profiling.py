"""Which errors stop the profiler: on a GPU, stopping waits for collectives that may never complete."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_align.errors import StoppedEarly
from offline_align.train import profiling


@pytest.mark.parametrize(("error", "ended"), [(StoppedEarly("saved"), True), (RuntimeError("boom"), False)])
def test_a_recording_does_not_wait_for_the_step_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, ended: bool
) -> None:
    traces: list[Path] = []

    @contextlib.contextmanager
    def trace(path: Path) -> Iterator[None]:
        yield
        traces.append(path)

    monkeypatch.setattr(profiling, "_torch_trace", trace)
    monkeypatch.setattr(profiling, "_abandoned", [])
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    with pytest.raises(type(error)), profiling.StepProfiler([2, 3], tmp_path, rank=0) as profiler:
        profiler.before(2)
        raise error
    assert bool(traces) == ended
