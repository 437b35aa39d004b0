"""Kill training in every phase of a save and at random moments: losses and weights stay bitwise equal.

`FAULTS=all` kills all training stages in every phase, with synchronous and background saves, and
some hundred times at random.
"""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import trainings
from tests.faults.forks import Forks

ALL = os.environ.get("FAULTS") == "all"
KILLS = int(os.environ.get("FAULTS_KILLS", "50" if ALL else "3"))
PLACES = ("before write", "mid-shard", "before manifest", "before rename", "before latest", "during delete")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    trainings.write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def forks(given: Path) -> Iterator[Forks]:
    with Forks(given) as made:
        yield made


_straight: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}


def straight(forks: Forks, given: Path, stage: str, world: int = 1) -> tuple[dict[str, Any], float]:
    """Return the result of an uninterrupted run and its seconds; it runs only once."""
    if (stage, world) not in _straight:
        run_dir = given / f"{stage}_whole_{world}"
        ended = forks.run(trainings.words(stage, given, run_dir), world=world)
        assert not any(ended.codes), ended.said
        _straight[stage, world] = trainings.result(run_dir), ended.seconds
    return _straight[stage, world]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", trainings.TRAINERS)
@pytest.mark.parametrize("more", [[], *([["trainer.async_save=true"]] if ALL else [])], ids=str)
def test_after_a_kill_in_a_save_the_old_or_the_new_checkpoint_is_whole(
    given: Path, forks: Forks, place: str, stage: str, more: list[str]
) -> None:
    if not ALL and PLACES.index(place) % len(trainings.TRAINERS) != trainings.TRAINERS.index(stage):
        pytest.skip("FAULTS=all kills every trainer in every phase")
    expected, _ = straight(forks, given, stage)
    run_dir = given / f"{stage}_{place}_{len(more)}".replace(" ", "_")
    words = trainings.words(stage, given, run_dir, *more)
    for number in (2, 1):
        # Kill at the second save of the run, then at the first save of the continuation.
        ended = forks.run(words, sabotage=("at", [place, number, [signal.SIGKILL]]))
        assert ended.code == -signal.SIGKILL, ended
    ended = forks.run(words)
    assert ended.code == 0, ended.said
    assert "DAMAGED" not in ended.said
    assert trainings.result(run_dir) == expected


@pytest.mark.parametrize("stage", trainings.TRAINERS)
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random(given: Path, forks: Forks, stage: str, world: int) -> None:
    if not ALL and (stage, world) not in (("sft", 1), ("reward", 2)):
        pytest.skip("FAULTS=all kills every trainer on one and on two ranks")
    expected, seconds = straight(forks, given, stage, world)
    draw = random.Random(f"{stage} {world}")
    goal = KILLS if world == 1 else max(1, KILLS // 3)
    kills = continued = runs = 0
    while kills < goal:
        run_dir = given / f"{stage} random {world}"
        shutil.rmtree(run_dir, ignore_errors=True)
        words = trainings.words(stage, given, run_dir, f"trainer.async_save={'true' if runs % 2 else 'false'}")
        for attempt in range(100):
            after = seconds * draw.uniform(0.0, 0.7 + attempt / 10)
            victims = [draw.randrange(world)] if draw.random() < 0.5 else None
            ended = forks.run(words, world=world, signal_after_seconds=after, victims=victims)
            assert "Traceback" not in ended.said and "DAMAGED" not in ended.said, ended.said
            if not any(ended.codes):
                break
            kills += 1
            continued += bool(list(run_dir.glob("checkpoints/step_*")))
        runs += 1
        assert trainings.result(run_dir) == expected, f"{stage}, {world} ranks, run {runs}, {kills} kills"
    print(f"{stage}, ranks {world}: {runs} runs, {kills} kills, {continued} with a checkpoint to go on from")
