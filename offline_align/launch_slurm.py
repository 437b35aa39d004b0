"""A stage as one Slurm job: the launcher section as the head of `scripts/slurm/stage.sbatch`, and its submission.

The text is a pure function of the configuration. What runs in the job, its signals and its requeue stand in that
script, which can also be submitted by hand.
"""

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from offline_align.config.runs import Run, section
from offline_align.config.sections import Device, LauncherSection
from offline_align.distributed.launched import RANK_VARIABLES
from offline_align.distributed.stopping import parse_duration
from offline_align.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)
_SAME_FOR_ALL = "# ---- The same for every job"
# Slurm reads options of a script in its own way: a backslash holds inside both kinds of quotes.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")
# Said by the launcher section for the job, and no business of the ranks in it.
_OWN_WORDS = ("launcher=", "launcher.", "dry_run=")
# Variables that Slurm, MPI and torchrun set for a job, a step or a rank.
_LAUNCHER_PREFIXES = ("SLURM_", "SLURMD_", "PMI_", "PMIX_", "OMPI_", "MV2_COMM_", "TORCHELASTIC_", "OFFLINE_ALIGN_")
# In an allocation these are of it as well.
_ALLOCATION_PREFIXES = ("SBATCH_", "SRUN_", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
# How Slurm's programs find the cluster.
_CLIENT_SETTINGS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_JWT"}


def job_text(config: Run, stage: str, words: list[str], on_gpus: bool = True) -> str:
    """Return the batch script that runs `stage`, whose command-line `words` gave `config`, which has a launcher."""
    launcher = section(config, LauncherSection)
    assert launcher is not None
    run_dir = config.run.dir
    gpus = launcher.gpus_per_node
    if gpus is None:
        gpus = launcher.nproc_per_node if on_gpus and config.run.device is not Device.cpu else 0
    head = ["#!/usr/bin/env bash", *(f"#SBATCH {quoted(o)}" for o in _options(launcher, stage, run_dir, gpus))]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in launcher.environment.items()]
    own = [word for word in words if not word.startswith(_OWN_WORDS)]
    settings = [
        "set -euo pipefail",
        f"set -- {shlex.join([stage, *own])}",
        f"run_dir={shlex.quote(run_dir)}",
        f"python={shlex.quote(_python(launcher))}",
        f"container=({shlex.join(_container(launcher))})",
        f"check_nodes={str(launcher.check).lower()}",
        f"attempts={launcher.attempts}",
        f"margin_seconds={launcher.signal_margin_seconds}",
        f"requeue={str(launcher.requeue).lower()}",
    ]
    return "\n".join([*head, "", *settings, *exports, "", _SAME_FOR_ALL + _body()])


def quoted(option: str) -> str:
    """Return an option as Slurm reads it from a line of the script."""
    name, equals, value = option.partition("=")
    if not equals or _PLAIN.fullmatch(value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def log_folder(run_dir: str) -> Path:
    """Return the folder of the job's console and of each rank's output; Slurm does not make it."""
    return Path(run_dir) / "logs"


def submit(text: str, run_dir: str) -> str:
    """Submit the text of a job and return its id; one that is already there for the folder is not doubled.

    Raises ConfigError where Slurm refuses it, StorageError where the log folder cannot be made.
    """
    record = log_folder(run_dir) / "job"
    if there := _waiting_or_running(record):
        logger.info("%s: job %s is there already", run_dir, there)
        return there
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        command, environment = ["sbatch", "--parsable"], job_environment(os.environ)
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise StorageError(f"{record.parent}: {error.strerror}") from error
        raise ConfigError("launcher=slurm: sbatch is not on PATH; submit from a node of the cluster") from error
    if done.returncode:
        raise ConfigError(f"launcher=slurm: sbatch refuses the job: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    record.write_text(job + "\n", encoding="utf-8")
    return job


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a job inherits from the process that submits it: all variables but those of its launchers.

    sbatch hands its environment on. The new job sets only the variables of options that it was given, so that the
    others would be those of the allocation, container or rank from which it is submitted: srun reads
    SLURM_MEM_PER_CPU, and the batch script SLURM_RESTART_COUNT. Outside of an allocation SBATCH_ACCOUNT and its like
    are settings of the user, and inside of one they may be those of the job that runs.
    """
    in_allocation = "SLURM_JOB_ID" in environment
    dropped = _LAUNCHER_PREFIXES + (_ALLOCATION_PREFIXES if in_allocation else ())
    return {
        name: value
        for name, value in environment.items()
        if name in _CLIENT_SETTINGS or not (name in RANK_VARIABLES or name.startswith(dropped))
    }


def _waiting_or_running(record: Path) -> str | None:
    """Return the job that was submitted before for the same folder, if Slurm still has it to do."""
    if not record.is_file():
        return None
    job = record.read_text(encoding="utf-8").strip()
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return job if done.stdout.strip() else None


def _options(launcher: LauncherSection, stage: str, run_dir: str, gpus: int) -> Iterator[str]:
    """Yield the options of sbatch, the user's own last: of two the later holds."""
    yield f"--job-name={launcher.job_name or f'offline-align-{stage}'}"
    yield f"--nodes={launcher.nodes}"
    yield f"--ntasks-per-node={launcher.nproc_per_node}"
    if gpus:
        yield f"--gpus-per-node={gpus}"
    if launcher.cpus_per_task is not None:
        yield f"--cpus-per-task={launcher.cpus_per_task}"
    for name, value in (("partition", launcher.partition), ("account", launcher.account)):
        if value is not None:
            yield f"--{name}={value}"
    if launcher.time is not None:
        yield f"--time={_slurm_time(launcher.time)}"
    if launcher.dependency is not None:
        yield f"--dependency=afterok:{launcher.dependency}"
        yield "--kill-on-invalid-dep=yes"
    # Slurm takes `%` in a file name for the start of a field.
    yield f"--output={str(log_folder(run_dir)).replace('%', '%%')}/slurm-%j.out"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{launcher.signal_margin_seconds}"
    yield "--requeue" if launcher.requeue else "--no-requeue"
    for name, value in launcher.sbatch.items():
        yield f"--{name}" if value is True else f"--{name}={value}"


def _slurm_time(text: str) -> str:
    """Return a duration as Slurm reads it, which knows no `3h50m`."""
    if ":" in text:
        return text
    minutes = int(parse_duration(text, "launcher.time")) // 60
    return f"{minutes // 60}:{minutes % 60:02d}:00"


def _container(launcher: LauncherSection) -> list[str]:
    """Return the words for srun of pyxis."""
    if launcher.container_image is None:
        return []
    mounts = ",".join(launcher.container_mounts)
    words = [f"--container-image={launcher.container_image}", f"--container-workdir={Path.cwd()}"]
    return [*words, *([f"--container-mounts={mounts}"] if mounts else [])]


def _python(launcher: LauncherSection) -> str:
    """Return what runs the ranks: this very Python, or that of the image."""
    return launcher.python or (sys.executable if launcher.container_image is None else "python")


def _body() -> str:
    package = Path(__file__).resolve().parent
    carried = package / "scripts" / "slurm" / "stage.sbatch"
    script = carried if carried.is_file() else package.parent / "scripts" / "slurm" / "stage.sbatch"
    return script.read_text(encoding="utf-8").partition(_SAME_FOR_ALL)[2]
