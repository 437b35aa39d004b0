"""Starting ranks: torchrun arguments, torchrun's own launcher on this machine, and what ranks find set."""

import logging
import os
import signal
import sys
from typing import Any

from offline_align.config.sections import LauncherKind, LauncherSection, ParallelSection
from offline_align.distributed.launched import Launcher, launched, shown
from offline_align.errors import AlignError, StoppedEarly
from offline_align.lineage import effort

logger = logging.getLogger(__name__)


def needs_launch(launcher: LauncherSection) -> bool:
    """Whether ranks are still to be started: more than one is asked for and no launcher has done it."""
    return launcher.nproc_per_node > 1 and launched() is None


def contradictions(launcher: LauncherSection) -> list[str]:
    """Return where the launcher section asks for other ranks than those that a launcher has started.

    The batch script was made from the section, and it hands none of it on.
    """
    place = launched()
    if place is None or place.launcher is Launcher.batch_script:
        return []
    there = f"{place.launcher} has started this process as rank {place.rank} of {place.world_size}"
    mend = f"leave it to that launcher, or unset what it has set ({shown()})"
    if launcher.kind is LauncherKind.slurm:
        return [f"launcher=slurm: {there}; {mend}"]
    asked, started = launcher.nproc_per_node, place.local_world_size
    if asked > 1 and (place.launcher is Launcher.other or asked != started):
        return [f"launcher.nproc_per_node={asked}: {there}, {started} on this node; {mend}"]
    if launcher.nodes > 1 and launcher.nodes * started != place.world_size:
        return [f"launcher.nodes={launcher.nodes}: {there}, {started} on this node; {mend}"]
    return []


def torchrun_command(launcher: LauncherSection, stage: str, words: list[str]) -> list[str]:
    """Return the command line that starts `stage` on the launcher's nodes."""
    command = ["torchrun", f"--nproc-per-node={launcher.nproc_per_node}"]
    if launcher.nodes > 1:
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=$HEAD_NODE:29500"]
        command += [f"--nnodes={launcher.nodes}", *rendezvous]
    else:
        command.append("--standalone")
    return [*command, "-m", "offline_align", stage, *words]


def set_cuda_environment(parallel: ParallelSection) -> None:
    """Set what a rank wants of CUDA, before it loads torch and where the user has not set it.

    Bins differ in length, and memory that can grow in place is not lost between them. With one hardware queue kernels
    start in the order of their launches, so that the communication of tensor parallel ranks starts before the matrix
    product that it is to overlap with; without such ranks more queues are better: gradients are reduced beside the
    backward pass.
    """
    # The older name stands in many batch scripts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if parallel.tensor_model_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_openmp_environment() -> None:
    """Let threads of OpenMP that have nothing to do sleep, before torch loads libgomp and if the user has not chosen.

    By default they spin for milliseconds at the end of each operation, and so take the cores from another command that
    runs on them. Results do not depend on it.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run_ranks(launcher: LauncherSection, stage: str, words: list[str]) -> int:
    """Start the ranks of this machine by torchrun's launcher, wait, and return the exit code of the stage.

    Where ranks fail, the code is that of the rank that knows why, so that 65, 74, 75 and 78 keep their meaning. Raises
    AlignError naming the rank where a signal from outside has ended one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=launcher.nproc_per_node,
        rdzv_backend="c10d",
        # Port 0: any free one, so that several runs on one machine do not meet.
        rdzv_endpoint="localhost:0",
        run_id=effort.launch_name(),
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "offline_align", stage, *words)
    except ChildFailedError as error:
        _say_first_error(*error.get_first_failure())
        return _outcome({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException:
        # The ranks were sent the signal too, have saved what they had, and are gone.
        return StoppedEarly.exit_code
    return 0


def _outcome(codes: dict[int, int]) -> int:
    """Return the exit code that failed ranks have in common, a signal being minus its number.

    Most of them have lost another rank (70), or were ended by the launcher after it, which stops them as a scheduler
    would (75): the others know why.
    """
    ended_after_others = (AlignError.exit_code, StoppedEarly.exit_code)
    known = [code for code in codes.values() if code > 0 and code not in ended_after_others]
    if known:
        return known[0]
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = next(iter(killed.items()))
        raise AlignError(
            f"rank {rank} was ended by {signal.Signals(number).name}, and with it all others; run the same command "
            "again to continue"
        )
    # Ranks stop early together: one that failed has not stopped, and a scheduler shall not take it for that.
    stopped = StoppedEarly.exit_code in codes.values() and AlignError.exit_code not in codes.values()
    return StoppedEarly.exit_code if stopped else AlignError.exit_code


def _say_first_error(rank: int, failure: Any) -> None:
    """Say what ended the ranks, where it was not rank 0, which has said it itself: the others write into files.

    A rank that was killed has said nothing; `_outcome` names it.
    """
    if failure.exitcode == StoppedEarly.exit_code or failure.exitcode < 0 or rank == 0:
        return
    said = failure.message
    logger.error("first error, rank %d: %s", rank, said["message"] if isinstance(said, dict) else said)
