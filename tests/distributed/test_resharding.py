"""Checkpoints with optimizer state, saved at one layout of four ranks and loaded at another."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import trainings
from tests.faults.forks import Forks
from tests.training import metrics

ALL = os.environ.get("FAULTS") == "all"
TENSOR_PARALLEL = (4, 2, 1)
CHANGES = [(a, b) for a in TENSOR_PARALLEL for b in TENSOR_PARALLEL if a != b]
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding")
    trainings.write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def forks(given: Path) -> Iterator[Forks]:
    with Forks(given) as made:
        yield made


def layout(tensor_parallel: int) -> list[str]:
    size = f"parallel.tensor_model_parallel_size={tensor_parallel}"
    return [size, f"parallel.sequence_parallel={'true' if tensor_parallel > 1 else 'false'}"]


def words(stage: str, given: Path, run_dir: Path, tensor_parallel: int) -> list[str]:
    more = ["model.num_query_groups=4", "trainer.max_steps=12", "trainer.eval_interval=100", "optim.lr=1e-3"]
    return trainings.words(stage, given, run_dir, *more, *layout(tensor_parallel))


def stopped(forks: Forks, given: Path, stage: str, tensor_parallel: int) -> Path:
    """Return a run that was stopped after two steps at a layout; it runs only once."""
    run_dir = given / f"{stage} at {tensor_parallel}"
    if not run_dir.exists():
        stop = ("at", ["step", 2, [signal.SIGTERM], 0])
        ended = forks.run(words(stage, given, run_dir, tensor_parallel), world=4, sabotage=stop)
        assert ended.codes == [75] * 4, ended.said
    return run_dir


def test_ranks_share_the_writing(forks: Forks, given: Path) -> None:
    """All four ranks write about the same amount, although data parallel ranks have the same tensors."""
    checkpoint = stopped(forks, given, "sft", 2) / "checkpoints" / "latest"
    sizes = [file.stat().st_size for file in checkpoint.resolve().glob("*.distcp")]
    assert len(sizes) == 4
    assert max(sizes) < 1.3 * min(sizes), sizes


def test_a_save_sends_nothing_of_the_state(forks: Forks, given: Path) -> None:
    ended = forks.run(words("sft", given, given / "silent", 1), world=4, sabotage=("saves_send_no_tensors", []))
    assert not any(ended.codes), ended.said


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Return every tensor of a checkpoint, gathered: weights, fp32 copies and both moments."""
    from megatron.core import dist_checkpointing

    from offline_align.config.sections import ParallelSection, RunSection
    from offline_align.distributed.setup import session

    with session(ParallelSection(), RunSection(dir="unused")):
        found: dict[str, Any] = dist_checkpointing.load_plain_tensors(str(checkpoint))
        return found


def same(one: Path, other: Path) -> bool:
    """Return whether the tensors of two checkpoints are bitwise equal; assert that they include moments."""
    import torch

    before, after = tensors(one), tensors(other)
    # A checkpoint also has the optimizer's parameter groups, which are not tensors.
    held = [name for name, tensor in before.items() if isinstance(tensor, torch.Tensor)]
    assert sum("exp_avg" in name for name in held) >= 2
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in held)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_megatrons_own_format_has_the_same_tensors(given: Path, forks: Forks, tensor_parallel: int) -> None:
    """Our checkpoint is saved again in megatron's own format for any layout, and that one in ours."""
    source = stopped(forks, given, "sft", tensor_parallel)
    step = max((source / "checkpoints").glob("step_*"))
    for by_megatron in (True, False):
        copy = given / f"{tensor_parallel} {by_megatron}"
        run_dir = given / f"{tensor_parallel} {by_megatron} from"
        shutil.copytree(source, run_dir, symlinks=True)
        command = words("sft", given, run_dir, tensor_parallel)
        ended = forks.run(command, world=4, sabotage=("saved_again", [str(copy), by_megatron]))
        assert not any(ended.codes), ended.said
        assert same(step, copy / "checkpoints" / step.name)
        source = copy


@pytest.mark.parametrize(("saved_at", "loaded_at"), CHANGES if ALL else [(4, 2), (2, 1), (1, 4)])
def test_another_layout_continues_with_the_same_state(given: Path, forks: Forks, saved_at: int, loaded_at: int) -> None:
    source = stopped(forks, given, "sft", saved_at)
    step = max((source / "checkpoints").glob("step_*"))
    run_dir, copy = given / f"{saved_at} to {loaded_at}", given / f"{saved_at} to {loaded_at} again"
    shutil.copytree(source, run_dir, symlinks=True)
    ended = forks.run(words("sft", given, run_dir, loaded_at), world=4, sabotage=("saved_again", [str(copy)]))
    assert not any(ended.codes), ended.said
    assert same(step, copy / "checkpoints" / step.name)
    straight = given / f"straight {saved_at}"
    if not straight.exists():
        shutil.copytree(source, straight, symlinks=True)
        assert not any(forks.run(words("sft", given, straight, saved_at), world=4).codes)
    assert len(metrics(run_dir)) == 12
    assert metrics(run_dir)[:2] == metrics(source)[:2]
    assert metrics(run_dir) == pytest.approx(metrics(straight), rel=1e-5)


def test_trained_at_four_labelled_at_one(given: Path, forks: Forks) -> None:
    source = stopped(forks, given, "reward", 4)
    scores = {}
    for world, size in ((1, 1), (4, 4)):
        run_dir = given / f"labels {world}"
        model = (source / "checkpoints" / "latest").resolve()
        label = ["label", f"run.dir={run_dir}", f"init.from={model}", f"data.input={given / 'samples.jsonl'}"]
        ended = forks.run([*label, "data.max_length=128", "run.device=cpu", *layout(size)], world=world)
        assert not any(ended.codes), ended.said
        rows = [json.loads(line) for line in (run_dir / "labelled.jsonl").read_text().splitlines()]
        scores[world] = {row["id"]: row["reward_raw"] for row in rows}
    assert scores[1] == pytest.approx(scores[4], abs=1e-5)
