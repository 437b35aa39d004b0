"""Start ranks: torchrun commands, torch's elastic launcher, and environment variables of ranks."""

import logging
import os
import signal
import sys
from typing import Any

from offline_align.config.sections import LauncherKind, LauncherSection, ParallelSection
from offline_align.distributed.launched import Launcher, launched, shown
from offline_align.distributed.stopping import leave_words_to_the_ranks, signals_heard
from offline_align.errors import AlignError, StoppedEarly
from offline_align.lineage import effort

logger = logging.getLogger(__name__)
_LONGEST_SAVE_SECONDS = 3600


def needs_launch(launcher: LauncherSection) -> bool:
    """Return whether this command must start several ranks, because no launcher has done so."""
    return launcher.nproc_per_node > 1 and launched() is None


def contradictions(launcher: LauncherSection) -> list[str]:
    """Return one problem if the launcher section contradicts the ranks that a launcher has started.

    Ranks of the batch script are not checked: the script was made from this section, and a
    configuration file that is passed on to its ranks may still hold older values.
    """
    started = launched()
    if started is None or started.launcher is Launcher.batch_script:
        return []
    facts = f"{started.launcher} has started this process as rank {started.rank} of {started.world_size}"
    fix = f"remove the setting, or unset the launcher's variables ({shown()})"
    if launcher.kind is LauncherKind.slurm:
        return [f"launcher=slurm: {facts}; {fix}"]
    asked, per_node = launcher.nproc_per_node, started.local_world_size
    if asked > 1 and (started.launcher is Launcher.other or asked != per_node):
        return [f"launcher.nproc_per_node={asked}: {facts}, {per_node} on this node; {fix}"]
    if launcher.nodes > 1 and launcher.nodes * per_node != started.world_size:
        return [f"launcher.nodes={launcher.nodes}: {facts}, {per_node} on this node; {fix}"]
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
    """Set CUDA variables of a rank before torch is imported, unless the user has set them.

    Bins differ in length; with expandable segments the allocator does not fragment memory between
    them. One hardware queue starts kernels in launch order, so tensor parallel communication starts
    before the matrix product that it overlaps with. Without tensor parallelism more queues are
    better, because gradients are reduced during the backward pass.
    """
    # Many batch scripts still set the older name.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if parallel.tensor_model_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_openmp_environment() -> None:
    """Make idle OpenMP threads sleep, unless the user has chosen; call before importing torch.

    By default they spin for milliseconds after each operation and take cores away from other
    commands on the machine. The setting does not change results.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def run_ranks(launcher: LauncherSection, stage: str, words: list[str]) -> int:
    """Start the ranks of this machine with torch's elastic launcher and return the exit code.

    If ranks fail, the code is that of the rank with the original error, so 65, 74, 75 and 78 keep
    their meaning. Raises AlignError naming the rank if a signal from outside has killed one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=launcher.nproc_per_node,
        rdzv_backend="c10d",
        # Port 0 selects a free port, so several runs on one machine do not collide.
        rdzv_endpoint="localhost:0",
        run_id=effort.launch_name(),
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        # By default the launcher kills ranks that are still saving after 30 s. A second signal ends
        # them at once.
        shutdown_timeout=_LONGEST_SAVE_SECONDS,
    )
    leave_words_to_the_ranks()
    # It warns of every signal that it passes on, which is what the user has asked for.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        elastic_launch(config, sys.executable)("-m", "offline_align", stage, *words)
    except ChildFailedError as error:
        _log_first_error(*error.get_first_failure())
        return _common_exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        # The launcher has passed the signal to the ranks, and they have saved and exited, or were told
        # to exit at once.
        return StoppedEarly.exit_code if signals_heard() < 2 else 128 + error.sigval
    return 0


def _common_exit_code(codes: dict[int, int]) -> int:
    """Return one exit code for failed ranks; in `codes`, a signal is its negative number.

    Most ranks exit because they have lost another rank (70) or because the launcher has stopped
    them afterwards (75). Any other code tells the cause.
    """
    consequences = (AlignError.exit_code, StoppedEarly.exit_code)
    causes = [code for code in codes.values() if code > 0 and code not in consequences]
    if causes:
        return causes[0]
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = next(iter(killed.items()))
        raise AlignError(
            f"rank {rank} was ended by {signal.Signals(number).name}, and all others after it; run the same command "
            "again to continue"
        )
    # An early stop means that all ranks have stopped. If one has failed, a scheduler must not see
    # an early stop.
    stopped = StoppedEarly.exit_code in codes.values() and AlignError.exit_code not in codes.values()
    return StoppedEarly.exit_code if stopped else AlignError.exit_code


def _log_first_error(rank: int, failure: Any) -> None:
    """Log the first error of the ranks, unless rank 0 has reported it on the console itself.

    The other ranks write their errors into files. A killed rank has no message; `_common_exit_code`
    names it.
    """
    if failure.exitcode == StoppedEarly.exit_code or failure.exitcode < 0 or rank == 0:
        return
    message = failure.message
    logger.error("first error, rank %d: %s", rank, message["message"] if isinstance(message, dict) else message)
