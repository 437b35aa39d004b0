"""Training with damaged checkpoints, signals, time limits and losses or gradients that are not finite.

`FAULTS=all` tests every combination, otherwise a few.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offline_align.train import checkpoint
from tests.faults import trainings
from tests.faults.forks import Forks
from tests.training import metrics

ALL = os.environ.get("FAULTS") == "all"
KINDS = ("*.distcp", ".metadata", "metadata.json", "model.json", "state.json", "tokenizer/*", "checkpoint.json")
DAMAGES = ("empty", "half", "one bit", "gone")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    trainings.write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def forks(given: Path) -> Iterator[Forks]:
    with Forks(given) as made:
        yield made


@pytest.fixture(scope="module")
def expected(given: Path, forks: Forks) -> dict[str, Any]:
    """Return the result of an uninterrupted run."""
    ended = forks.run(trainings.words("sft", given, given / "whole"))
    assert ended.code == 0, ended.said
    return trainings.result(given / "whole")


@pytest.fixture(scope="module")
def unfinished(given: Path, forks: Forks, expected: dict[str, Any]) -> Path:
    """Return a run that was killed in its eighth step, with checkpoints of steps 4 and 6."""
    words = trainings.words("sft", given, given / "unfinished")
    assert forks.run(words, sabotage=("at", ["step", 8, [signal.SIGKILL]])).code == -signal.SIGKILL
    steps = sorted(path.name for path in (given / "unfinished" / "checkpoints").glob("step_*"))
    assert steps == ["step_00000004", "step_00000006"]
    return given / "unfinished"


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
        return
    if damage == "one bit":
        content[len(content) // 3] ^= 1
    path.write_bytes({"empty": b"", "half": bytes(content[: len(content) // 2]), "one bit": bytes(content)}[damage])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    given: Path, forks: Forks, unfinished: Path, expected: dict[str, Any], kind: str, damage: str, world: int
) -> None:
    if not ALL and (KINDS.index(kind) + 3 * DAMAGES.index(damage) + 5 * world) % 14:
        pytest.skip("FAULTS=all damages every kind of file in every way")
    run_dir = given / "damaged"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(unfinished, run_dir, symlinks=True)
    file = sorted((run_dir / "checkpoints" / "step_00000006").glob(kind))[0]
    harm(file, damage)
    ended = forks.run(trainings.words("sft", given, run_dir), world=world)
    assert not any(ended.codes), ended.said
    assert ended.said.count("DAMAGED") == 1
    assert f"DAMAGED ({file.relative_to(run_dir / 'checkpoints' / 'step_00000006')})" in ended.said
    assert "going back to step_00000004" in ended.said
    found = trainings.result(run_dir)
    if world == 1:
        assert found == expected
    assert found["checkpoints"] == expected["checkpoints"] and not found["leftovers"]


@pytest.mark.parametrize("world", [1, 2])
def test_without_a_whole_checkpoint_the_run_fails_and_does_not_start_again(
    given: Path, forks: Forks, unfinished: Path, world: int
) -> None:
    run_dir = given / "lost"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(unfinished, run_dir, symlinks=True)
    harm(run_dir / "checkpoints" / "step_00000006" / ".metadata", "half")
    harm(run_dir / "checkpoints" / "step_00000004" / "checkpoint.json", "gone")
    before = sorted(str(path) for path in (run_dir / "checkpoints").rglob("*"))
    for _ in range(2):
        ended = forks.run(trainings.words("sft", given, run_dir), world=world)
        assert ended.codes == [74] * world, ended.said
        assert ended.said.count("error:") == 1 and "no checkpoint is whole" in ended.said
        assert "step_00000006: .metadata; step_00000004: checkpoint.json" in ended.said
        assert sorted(str(path) for path in (run_dir / "checkpoints").rglob("*")) == before
    for step in (4, 6):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
    ended = forks.run(trainings.words("sft", given, run_dir), world=world)
    assert ended.codes == [74] * world and "points to step_00000006, which is gone" in ended.said


def stopped_in_the_last_validation(expected: dict[str, Any]) -> dict[str, Any]:
    """Return the expected result of such a run: only the state in the last checkpoint differs.

    That checkpoint was saved before the validation. The continuation validates, moves the link to the
    best checkpoint, and saves no further checkpoint.
    """
    step = expected["state"]["step"]
    losses = {
        row["step"]: row["valid_loss"] for row in expected["metrics"] if "valid_loss" in row and row["step"] < step
    }
    best = min(losses, key=lambda at: losses[at])
    state = {"validation_due": True, "best_step": best, "best_value": losses[best]}
    return expected | {"state": expected["state"] | state}


CALLS = [
    ("step", 4, [signal.SIGTERM], 1),
    ("validation", 2, [signal.SIGUSR1], 2),
    ("mid-shard", 1, [signal.SIGINT], 1),
    ("validation", 1, [signal.SIGTERM, signal.SIGINT], 1),
    ("mid-shard", 3, [signal.SIGTERM, signal.SIGUSR1], 2),
    ("step", 5, [signal.SIGINT], 2),
    ("validation", 4, [signal.SIGTERM], 1),
    ("before rename", 2, [signal.SIGUSR1], 1),
    ("before latest", 3, [signal.SIGTERM], 1),
    ("during delete", 1, [signal.SIGTERM, signal.SIGINT], 1),
]


@pytest.mark.parametrize(("place", "number", "signals", "world"), CALLS if ALL else CALLS[:4])
def test_a_signal_saves_and_a_second_one_ends_the_run_at_once(
    given: Path,
    forks: Forks,
    expected: dict[str, Any],
    place: str,
    number: int,
    signals: list[signal.Signals],
    world: int,
) -> None:
    run_dir = given / f"signal {place} {number} {world}"
    words = trainings.words("sft", given, run_dir, f"trainer.async_save={'true' if number % 2 else 'false'}")
    victim = 0 if world == 1 or place == "mid-shard" else world - 1
    ended = forks.run(words, world=world, sabotage=("at", [place, number, signals, victim]))
    if len(signals) == 1:
        assert ended.codes == [75] * world, ended
        assert ended.said.count("stopped by") == 1
    else:
        assert ended.codes[victim] == -signals[1], ended
    assert "Traceback" not in ended.said
    ended = forks.run(words, world=world)
    assert not any(ended.codes), ended.said
    found = trainings.result(run_dir)
    if world == 1:
        last = place == "validation" and number == 4
        assert found == (stopped_in_the_last_validation(expected) if last else expected)
    assert len(found["metrics"]) == len(expected["metrics"])


@pytest.mark.skipif(not ALL, reason="FAULTS=all tries it")
def test_many_short_attempts_make_the_same_run(given: Path, forks: Forks, expected: dict[str, Any]) -> None:
    words = trainings.words("sft", given, given / "chain", "trainer.max_time=0.01")
    codes: list[int] = []
    while not codes or codes[-1] == 75:
        assert len(codes) < 20
        codes.append(forks.run(words).code)
    # One attempt a step, and one for the last validation, which came after the last checkpoint.
    assert codes == [75] * 11 + [0]
    assert trainings.result(given / "chain") == stopped_in_the_last_validation(expected)


@pytest.mark.skipif(not ALL, reason="FAULTS=all tries it")
def test_a_limit_is_kept(given: Path, forks: Forks, expected: dict[str, Any]) -> None:
    """With a limit in the middle of the run, the run stops while there is time for two steps and a save."""
    whole = forks.run(trainings.words("sft", given, given / "timed"))
    limit = 0.7 * whole.seconds
    words = trainings.words("sft", given, given / "limited", f"trainer.max_time={limit:.2f}")
    ended = forks.run(words)
    assert ended.code == 75 and ended.seconds < 1.3 * limit
    assert forks.run([*words[:-1], "trainer.max_time=1h"]).code == 0
    assert trainings.result(given / "limited") == expected


POISONS = [
    ("gradient", "nan", 2, "fp32"),
    ("loss", "inf", 2, "bf16"),
    ("gradient", "inf", 2, "fp32"),
    ("loss", "nan", 2, "fp32"),
    ("gradient", "nan", 2, "bf16"),
    ("loss", "nan", 1, "fp32"),
]


@pytest.mark.parametrize(("what", "value", "world", "precision"), POISONS if ALL else POISONS[:2])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    given: Path, forks: Forks, what: str, value: str, world: int, precision: str
) -> None:
    run_dir = given / f"{what} {value} {world} {precision}"
    run_dir.mkdir()
    poison = [str(run_dir), what, float(value), world - 1, 3, 2]
    words = trainings.words("sft", given, run_dir, f"trainer.precision={precision}")
    ended = forks.run(words, world=world, sabotage=("not_finite_and_weights", poison))
    assert not any(ended.codes), ended.said
    assert ended.said.count("skipped on all ranks") == 2
    assert "step 3 skipped on all ranks" in ended.said and "rows s" in ended.said
    rows = trainings.result(run_dir)["metrics"]
    skipped = {row["step"]: row["skipped_steps"] for row in rows if "skipped_steps" in row}
    assert [skipped[step] for step in (2, 3, 4, 5, 11)] == [0, 1, 2, 2, 2]
    hashes = {(run_dir / f"weights_{rank}").read_text() for rank in range(world)}
    assert len(hashes) == 1


def test_three_such_steps_in_a_row_end_the_run_across_a_continuation(given: Path, forks: Forks) -> None:
    run_dir = given / "three"
    run_dir.mkdir()
    words = trainings.words("sft", given, run_dir, "trainer.save_interval=1")
    poison = [str(run_dir), "gradient", float("nan"), 1, 4, 3]
    ended = forks.run(words, world=2, sabotage=("not_finite_and_weights", poison))
    assert ended.codes == [70, 70], ended
    assert "3 steps in a row were not finite, up to step 6" in ended.said
    assert (run_dir / "weights_0").read_text() == (run_dir / "weights_1").read_text()
    assert sorted(path.name for path in run_dir.glob("checkpoints/step_*"))[-1] == "step_00000005"
    # Two steps were skipped before that checkpoint was saved, so one more ends the run.
    poison = [str(run_dir), "gradient", float("nan"), 1, 1, 1]
    ended = forks.run(words, world=2, sabotage=("not_finite_and_weights", poison))
    assert ended.codes == [70, 70], ended
    assert not any(forks.run(words, world=2).codes)


@pytest.mark.parametrize(("before", "after"), [("true", "false"), ("false", "true")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_continues_from_a_checkpoint_before_its_first_update(
    given: Path, forks: Forks, before: str, after: str, precision: str
) -> None:
    """If the first update was skipped there are no moments yet, with or without a distributed optimizer."""
    run_dir = given / f"first {before} {precision}"
    run_dir.mkdir()
    more = [f"trainer.precision={precision}", "trainer.save_interval=1", "trainer.keep_checkpoints=20"]
    # The two optimizers sum norms in a different order. With clipping, bf16 weights would sometimes round differently.
    more += ["optim.clip_grad=0"] if precision == "bf16" else []
    words = trainings.words("sft", given, run_dir, *more)
    poison = ["gradient", float("nan"), 1, 1, 1]
    divided = "parallel.use_distributed_optimizer="
    ended = forks.run([*words, divided + before], world=2, sabotage=("not_finite", poison))
    assert not any(ended.codes), ended.said
    assert "step 1 skipped on all ranks" in ended.said
    expected = {name: metrics(run_dir, name) for name in ("loss", "grad_norm", "skipped_steps")}
    for later in range(2, 12):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{later:08d}")
    checkpoint.link(run_dir / "checkpoints" / "step_00000001", "latest")
    ended = forks.run([*words, divided + after], world=2)
    assert not any(ended.codes), ended.said
    for name, values in expected.items():
        found = metrics(run_dir, name)
        assert found[0] == values[0]  # None for the norm of the update that was skipped
        # Up to the first update, both runs have the same weights.
        assert found[1] == pytest.approx(values[1], rel=1e-6)
        # Then the optimizers add up norms in a different order, and roundings of 6e-8 grow over nine updates: to
        # 1.4e-6 on one CPU. A step count that is wrong by one would make the first update a quarter smaller.
        assert found[2:] == pytest.approx(values[2:], rel=1e-5)


def test_missing_space_for_checkpoints_is_reported_before_the_first_step(given: Path, forks: Forks) -> None:
    words = trainings.words("sft", given, given / "narrow")
    ended = forks.run(words, world=2, sabotage=("little_space", [3_000_000]))
    assert ended.codes == [74, 74]
    assert ended.said.count("error:") == 1
    assert "GB are free, and 4 more checkpoints of about" in ended.said
    assert not (given / "narrow" / "metrics.jsonl").exists()
    assert forks.run(words).code == 0


def test_the_newest_checkpoint_is_always_whole(given: Path, forks: Forks, expected: dict[str, Any]) -> None:
    """With one checkpoint kept and a save after every step, an observer always finds a whole checkpoint."""
    import threading

    from tests.faults.watching import alone

    run_dir, over, looks = given / "watched", threading.Event(), 0
    bad: list[str] = []

    def look() -> None:
        nonlocal looks
        while not over.wait(0.01):
            there = checkpoint.newest(run_dir)
            names = checkpoint.damage(there, alone()) if there else []
            # A checkpoint that has disappeared meanwhile was replaced by a newer one.
            if there and names and there.exists():
                bad.append(f"{there.name}: {names}")
            looks += there is not None

    watcher = threading.Thread(target=look)
    watcher.start()
    more = ["trainer.keep_checkpoints=1", "trainer.save_interval=1", "trainer.async_save=true"]
    ended = forks.run(trainings.words("sft", given, run_dir, *more))
    over.set()
    watcher.join()
    assert ended.code == 0, ended.said
    assert looks > 20 and not bad
    assert trainings.result(run_dir)["metrics"] == expected["metrics"]


def test_a_save_in_the_background_holds_the_state_of_its_request(
    given: Path, forks: Forks, expected: dict[str, Any]
) -> None:
    """Shards written steps later, or when the next save waits for them, have the state at the request."""
    kept = ["trainer.keep_checkpoints=20", "trainer.eval_interval=100"]
    whole, late = given / "kept", given / "late"
    assert forks.run(trainings.words("sft", given, whole, *kept)).code == 0
    for steps in (1, 3):  # written one step later, and only when the next save waits for it
        shutil.rmtree(late, ignore_errors=True)
        words = trainings.words("sft", given, late, *kept, "trainer.async_save=true")
        ended = forks.run(words, sabotage=("slow_shards", [steps]))
        assert ended.code == 0, ended.said
        for step in (2, 4, 6, 8, 10, 11):
            name = f"checkpoints/step_{step:08d}/__0_0.distcp"
            assert (late / name).read_bytes() == (whole / name).read_bytes(), (steps, step)
