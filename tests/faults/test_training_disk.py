"""A disk that fails during training: exit code 74 and one line, whole checkpoints, and the same result afterwards.

`FAULTS=all` lets every fifth change fail, with three errors in turn. Without it, a few changes fail.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_align.train import checkpoint
from tests.faults import trainings
from tests.faults.disk import FailingDisk
from tests.faults.forks import NEVER
from tests.faults.watching import alone

ALL = os.environ.get("FAULTS") == "all"
POINTS = 4
ERRORS = ((errno.EIO, 1), (errno.ENOSPC, NEVER), (errno.EROFS, NEVER))
SHORT = ["trainer.max_steps=4", "trainer.max_epochs=1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the failing disk"),
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    trainings.write_rows(folder)
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def disk(given: Path) -> Iterator[FailingDisk]:
    with FailingDisk(given, given / "out") as made:
        yield made


@pytest.mark.parametrize("more", [[], ["trainer.async_save=true"]], ids=["at once", "in the background"])
def test_a_disk_that_fails_costs_no_checkpoint(given: Path, disk: FailingDisk, more: list[str]) -> None:
    run_dir = given / "out" / "run"
    words = trainings.words("sft", given, run_dir, *SHORT, *more)
    whole = disk.on_disk(words)
    assert whole.code == 0, whole.said
    expected = trainings.result(run_dir)
    count, failed = whole.changes, 0
    # Most changes are small writes of a shard. The stride is coprime to 3, so each error hits each kind of change.
    points = range(0, count, 5) if ALL else [(2 * k + 1) * count // (2 * POINTS) for k in range(POINTS)]
    for point in points:
        shutil.rmtree(run_dir)
        error, times = ERRORS[point % 3]
        ended = disk.on_disk(words, point, error, times)
        place = f"change {point} of {count}, {errno.errorcode[error]}: {ended}"
        # A single failure may have no effect.
        assert ended.code == 74 or (ended.code == 0 and times == 1), place
        said = [line for line in ended.said.splitlines() if "error:" in line]
        assert len(said) == (ended.code == 74), place
        assert all("internal" not in line for line in said) and "Traceback" not in ended.said, place
        for folder in (run_dir / "checkpoints").glob("step_*"):
            assert not checkpoint.damage(folder, alone()), place
        failed += ended.code == 74
        again = disk.on_disk(words)
        assert again.code == 0, (place, again.said)
        assert trainings.result(run_dir) == expected, place
    assert failed
    shutil.rmtree(run_dir)
    print(f"{count} changes, {len(points)} of them failed, {failed} ended the run")
