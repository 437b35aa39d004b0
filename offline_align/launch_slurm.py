"""Run a stage as one Slurm job: generate its batch script from the launcher section, and submit it.

The generated head depends on the configuration alone. The rest of the script is
`scripts/slurm/stage.sbatch`: it starts the ranks, handles signals and requeues the job, and can
also be submitted by hand.
"""

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from offline_align.config.durations import parse_duration
from offline_align.config.runs import Run, section
from offline_align.config.sections import Device, LauncherSection
from offline_align.distributed.launched import RANK_VARIABLES
from offline_align.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)
_SAME_FOR_ALL = "# ---- The same for every job"
# Values that need no quotes in an #SBATCH line. Slurm's quoting differs from a shell's: a backslash
# escapes the next character inside both kinds of quotes.
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")
# These settings configure the job; the ranks in it do not get them.
_JOB_WORDS = ("launcher=", "launcher.", "dry_run=")
# Variables that Slurm, MPI and torchrun set for a job, a step or a rank.
_LAUNCHER_PREFIXES = ("SLURM_", "SLURMD_", "PMI_", "PMIX_", "OMPI_", "MV2_COMM_", "TORCHELASTIC_", "OFFLINE_ALIGN_")
# Inside an allocation, these variables belong to it as well.
_ALLOCATION_PREFIXES = ("SBATCH_", "SRUN_", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
# Variables by which Slurm's programs find the cluster.
_CLIENT_SETTINGS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_JWT"}


def job_text(config: Run, stage: str, words: list[str], on_gpus: bool = True) -> str:
    """Return the batch script that runs `stage` with the command-line `words`.

    `config` is the composed configuration of these words and has a launcher section.
    """
    launcher = section(config, LauncherSection)
    assert launcher is not None
    run_dir = config.run.dir
    gpus = launcher.gpus_per_node
    if gpus is None:
        gpus = launcher.nproc_per_node if on_gpus and config.run.device is not Device.cpu else 0
    head = ["#!/usr/bin/env bash", *(f"#SBATCH {quoted(o)}" for o in _options(launcher, stage, run_dir, gpus))]
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in launcher.environment.items()]
    stage_words = [word for word in words if not word.startswith(_JOB_WORDS)]
    settings = [
        "set -euo pipefail",
        f"set -- {shlex.join([stage, *stage_words])}",
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
    """Return an option quoted for an #SBATCH line."""
    name, equals, value = option.partition("=")
    if not equals or _PLAIN.fullmatch(value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def log_folder(run_dir: str) -> Path:
    """Return the folder of the job's and each rank's output; Slurm does not create it."""
    return Path(run_dir) / "logs"


def submit(text: str, run_dir: str) -> str:
    """Submit a batch script and return the job id, or return the id of this folder's unfinished job.

    Raises ConfigError if Slurm refuses the job, StorageError if the log folder cannot be created.
    """
    record = log_folder(run_dir) / "job"
    if unfinished := _unfinished_job(record):
        logger.info("%s: job %s is already waiting or running", run_dir, unfinished)
        return unfinished
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
    """Return the variables that a new job inherits: all but those that launchers have set.

    sbatch passes its environment to the job, and Slurm overwrites only the variables of options
    that the job has. The others would keep the values of the allocation, container or rank that
    submits: srun reads SLURM_MEM_PER_CPU, for example, and the batch script SLURM_RESTART_COUNT.
    Outside of an allocation, SBATCH_ACCOUNT and the like are the user's settings; inside, they may
    belong to the current job and are dropped.
    """
    in_allocation = "SLURM_JOB_ID" in environment
    dropped = _LAUNCHER_PREFIXES + (_ALLOCATION_PREFIXES if in_allocation else ())
    return {
        name: value
        for name, value in environment.items()
        if name in _CLIENT_SETTINGS or not (name in RANK_VARIABLES or name.startswith(dropped))
    }


def _unfinished_job(record: Path) -> str | None:
    """Return the job last submitted for the same folder if it still waits or runs."""
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
    """Yield the options of sbatch; the user's own come last, because the last one counts."""
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
    # In a file name of Slurm, `%` starts a field and `%%` is a percent sign.
    yield f"--output={str(log_folder(run_dir)).replace('%', '%%')}/slurm-%j.out"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{launcher.signal_margin_seconds}"
    yield "--requeue" if launcher.requeue else "--no-requeue"
    for name, value in launcher.sbatch.items():
        yield f"--{name}" if value is True else f"--{name}={value}"


def _slurm_time(text: str) -> str:
    """Return a duration in Slurm's format; Slurm does not know `3h50m`."""
    if ":" in text:
        return text
    minutes = int(parse_duration(text, "launcher.time")) // 60
    return f"{minutes // 60}:{minutes % 60:02d}:00"


def _container(launcher: LauncherSection) -> list[str]:
    """Return the options for srun's container plugin, pyxis."""
    if launcher.container_image is None:
        return []
    mounts = ",".join(launcher.container_mounts)
    words = [f"--container-image={launcher.container_image}", f"--container-workdir={Path.cwd()}"]
    return [*words, *([f"--container-mounts={mounts}"] if mounts else [])]


def _python(launcher: LauncherSection) -> str:
    """Return the Python for the ranks: the configured one, the image's, or the current one."""
    return launcher.python or (sys.executable if launcher.container_image is None else "python")


def _body() -> str:
    """Return `stage.sbatch` without its head, from the installed package or the checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / "scripts" / "slurm" / "stage.sbatch"
    script = packaged if packaged.is_file() else package.parent / "scripts" / "slurm" / "stage.sbatch"
    return script.read_text(encoding="utf-8").partition(_SAME_FOR_ALL)[2]
