"""Rank variables: set by a launcher, left over from another process, or contradictory."""

from typing import Any

import pytest

from offline_align.config.sections import LauncherKind, LauncherSection
from offline_align.distributed.launched import Launched, Launcher, forget_leftovers, launched
from offline_align.errors import ConfigError
from offline_align.launch import contradictions, needs_launch

ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "61007"}
"""The variables that enroot, NVIDIA's images and Kubeflow set for a single container."""
ENV = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
NODE = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN = ENV | NODE | {"TORCHELASTIC_RUN_ID": "none"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
SRUN = ENV | NODE | STEP | {"OFFLINE_ALIGN_STEP": "7.1"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (ONE, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, None),
        ({"TORCHELASTIC_RUN_ID": "none"}, None),
        # A batch script of 8 tasks, or a shell in it, before srun is called.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (TORCHRUN, Launched(Launcher.torchrun, 1, 4, 2)),
        (ONE | {"TORCHELASTIC_RUN_ID": "none"}, Launched(Launcher.torchrun, 0, 1, 1)),
        # srun or mpirun has started torchrun once on each node.
        (TORCHRUN | STEP, Launched(Launcher.torchrun, 1, 4, 2)),
        (TORCHRUN | {"PMI_RANK": "1", "PMI_SIZE": "2"}, Launched(Launcher.torchrun, 1, 4, 2)),
        (SRUN, Launched(Launcher.batch_script, 1, 4, 2)),
        (ENV, Launched(Launcher.other, 1, 4, 1)),
        # A user's script has set rank variables from those of the tasks.
        (ENV | STEP, Launched(Launcher.other, 1, 4, 1)),
    ],
)
def test_the_launcher_of_this_process(variables: dict[str, str], found: Launched | None) -> None:
    assert launched(variables) == found


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment: RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "3"}, "RANK=3 in the environment: WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment: RANK"),
        (ONE | {"RANK": "1"}, "RANK must be below WORLD_SIZE=1"),
        (ENV | {"RANK": "4"}, "RANK must be below WORLD_SIZE=4"),
        (ENV | {"RANK": "-1"}, "not all of them are whole numbers"),
        (ENV | {"WORLD_SIZE": "${N}"}, "not all of them are whole numbers"),
        (ENV | {"MASTER_PORT": "99999"}, "MASTER_PORT must be a port"),
        (ENV | {"MASTER_ADDR": ""}, "MASTER_ADDR missing"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE"),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT missing"),
        (STEP, "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=4 in the environment: srun has started copies"),
        # The variable belongs to an earlier step or to another job.
        (STEP | {"OFFLINE_ALIGN_STEP": "7.0"}, "srun has started copies"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "mpirun (Open MPI) has started copies"),
        (ONE | {"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpirun (MPICH, Intel MPI) has started copies"),
    ],
)
def test_contradictory_variables_are_refused_in_one_line(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        launched(variables)
    (problem,) = error.value.problems
    assert said in problem and "unset " in problem and "\n" not in problem


def test_leftovers_are_removed_and_named() -> None:
    variables = ONE | {"TORCHELASTIC_ERROR_FILE": "/outer/error.json", "TORCHELASTIC_ENABLE_FILE_TIMER": "1", "A": "b"}
    assert forget_leftovers(variables) == "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=61007"
    assert variables == {"TORCHELASTIC_ENABLE_FILE_TIMER": "1", "A": "b"}


@pytest.mark.parametrize(
    ("variables", "asked", "said"),
    [
        (TORCHRUN, {}, None),
        (TORCHRUN, {"nproc_per_node": 2}, None),
        (TORCHRUN, {"nproc_per_node": 2, "nodes": 2}, None),
        (
            TORCHRUN,
            {"nproc_per_node": 8},
            "launcher.nproc_per_node=8: torchrun has started this process as rank 1 of 4",
        ),
        (ONE | {"TORCHELASTIC_RUN_ID": "x"}, {"nproc_per_node": 2}, "launcher.nproc_per_node=2: torchrun has started"),
        (TORCHRUN, {"nodes": 4}, "launcher.nodes=4: torchrun has started this process as rank 1 of 4, 2 on this node"),
        (TORCHRUN, {"kind": LauncherKind.slurm}, "launcher=slurm: torchrun has started this process"),
        (ENV, {}, None),
        # The variables are left from an outer job, or set by hand; the two cases look the same.
        (ENV, {"nproc_per_node": 4}, "launcher.nproc_per_node=4: another launcher has started this process"),
        (ENV, {"kind": LauncherKind.slurm}, "(RANK=1 WORLD_SIZE=4 MASTER_ADDR=node0 MASTER_PORT=29500)"),
        # The batch script was made from the section; a configuration file may still hold older values.
        (SRUN, {"nproc_per_node": 8, "kind": LauncherKind.slurm}, None),
        (ONE, {"nproc_per_node": 2}, None),
    ],
)
def test_a_launcher_section_that_contradicts_the_launcher(
    variables: dict[str, str], asked: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(variables))
    found = contradictions(LauncherSection(**asked))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_ranks_are_started_despite_leftover_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(ONE))
    assert needs_launch(LauncherSection(nproc_per_node=2))
    monkeypatch.setattr("os.environ", dict(TORCHRUN))
    assert not needs_launch(LauncherSection(nproc_per_node=2))
