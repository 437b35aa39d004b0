"""Detect whether a launcher has started this process as one of several ranks.

Containers (enroot, Kubeflow), batch scripts and outer jobs leave rank variables in the environment,
so WORLD_SIZE alone proves nothing. A process is a rank if torchrun has started it, if it is a task
of our batch script, or if it has a complete set of `env://` variables for more than one rank.
Variables of a world of one without a launcher are leftovers. Any other combination is refused,
because a rank that runs alone by mistake would do so silently.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum

from offline_align.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables of torch's `env://` method: torchrun and the batch script set all of them."""
_TORCHRUN_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
)
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Rank and size variables of launchers that start copies of a command without `env://` variables.
_TASK_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE"),
}


class Launcher(StrEnum):
    """The program that started a rank."""

    torchrun = "torchrun"
    batch_script = "scripts/slurm/stage.sbatch"
    other = "another launcher"


@dataclass(frozen=True, slots=True)
class Launched:
    """The rank of this process and the sizes of its world, as its launcher set them."""

    launcher: Launcher
    rank: int
    world_size: int
    local_world_size: int


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """Return the launcher, rank and world size of this process, or None if it is not a rank.

    Raises ConfigError with the variables and their values if they are incomplete or contradict each
    other, or if srun or mpirun has started several copies of a command that are not ranks.
    """
    variables = os.environ if environment is None else environment
    launcher = _launcher(variables)
    if launcher is None:
        _refuse_copies(variables)
        return None
    _require_complete(variables)
    rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    return Launched(launcher, rank, world_size, int(variables.get("LOCAL_WORLD_SIZE", "1")))


def forget_leftovers(environment: MutableMapping[str, str] | None = None) -> str:
    """Remove rank variables from the environment of a non-rank process; return them as text.

    Otherwise libraries would read them, and child processes would inherit them.
    """
    variables = os.environ if environment is None else environment
    text = shown(variables)
    for name in (*RANK_VARIABLES, *_TORCHRUN_VARIABLES):
        variables.pop(name, None)
    return text


def shown(variables: Mapping[str, str] | None = None) -> str:
    """Return the rank variables that are set, for example `RANK=0 WORLD_SIZE=1`."""
    found = os.environ if variables is None else variables
    return " ".join(f"{name}={found[name]}" for name in RANK_VARIABLES if name in found)


def _launcher(variables: Mapping[str, str]) -> Launcher | None:
    step = f"{variables.get('SLURM_JOB_ID', '')}.{variables.get('SLURM_STEP_ID', '')}"
    if variables.get("OFFLINE_ALIGN_STEP") == step:
        return Launcher.batch_script
    if "TORCHELASTIC_RUN_ID" in variables and "WORLD_SIZE" in variables:
        return Launcher.torchrun
    # Containers set these values for a single process, or leave some of them.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    if all(variables.get(name, value) == value for name, value in alone.items()):
        return None
    return Launcher.other


def _require_complete(variables: Mapping[str, str]) -> None:
    """Raise ConfigError unless rank, world size and rendezvous address are complete and valid."""
    missing = [name for name in _NEEDED if not variables.get(name)]
    if missing:
        problem = f"{', '.join(missing)} missing, so this is not a rank of any launcher"
    elif not all(variables.get(n, "0").isdecimal() for n in (*RANK_VARIABLES[:4], "MASTER_PORT")):
        problem = "not all of them are whole numbers"
    elif not 0 < int(variables["MASTER_PORT"]) < 2**16:
        problem = "MASTER_PORT must be a port, 1 to 65535"
    elif int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        problem = f"RANK must be below WORLD_SIZE={variables['WORLD_SIZE']}"
    elif int(variables.get("LOCAL_RANK", "0")) >= int(variables.get("LOCAL_WORLD_SIZE", variables["WORLD_SIZE"])):
        problem = "LOCAL_RANK must be below LOCAL_WORLD_SIZE"
    else:
        return
    raise ConfigError(f"{shown(variables)} in the environment: {problem}; {_unset(variables)}")


def _refuse_copies(variables: Mapping[str, str]) -> None:
    for launcher, (rank, size) in _TASK_LAUNCHERS.items():
        if rank in variables and variables.get(size, "1") != "1":
            raise ConfigError(
                f"{rank}={variables[rank]} {size}={variables[size]} in the environment: {launcher} has started copies "
                "of this command, which would all do the same work; use launcher.nproc_per_node, launcher=slurm or "
                f"torchrun, or unset {rank} if this is the only copy"
            )


def _unset(variables: Mapping[str, str]) -> str:
    names = " ".join(name for name in RANK_VARIABLES if name in variables)
    return f"`unset {names}` if they are left from another job; otherwise start ranks with torchrun or launcher=slurm"
