"""Sections for the run folder, the device, the layout of ranks, the launcher and the time limit."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Device(StrEnum):
    """Device of the tensors. `auto` selects CUDA if a device is visible."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LauncherKind(StrEnum):
    """Who starts the ranks: this process on the local machine, or Slurm on the nodes of a job."""

    local = "local"
    slurm = "slurm"


class GpuKind(StrEnum):
    """GPUs of DGX nodes that a dry run can estimate for."""

    a100_40gb = "a100_40gb"
    a100_80gb = "a100_80gb"
    h100_80gb = "h100_80gb"
    h200_141gb = "h200_141gb"


@dataclass(frozen=True)
class RunSection:
    """Run folder, seed and device."""

    dir: str = MISSING
    """Run folder. The stage writes all its output there and nowhere else."""
    seed: int = 1234
    """Seed of the initialisation, the data order, the splits and the sampling."""
    device: Device = Device.auto
    """Device to run on. `auto` selects CUDA if a device is visible, else the CPU."""


@dataclass(frozen=True)
class ParallelSection:
    """Parallel layout.

    The data parallel size is the world size divided by the tensor and context parallel sizes.
    """

    tensor_model_parallel_size: int = 1
    """Tensor parallel size: the number of ranks that share each layer (paper: 4, set with
    `parallel=tp4 launcher.nproc_per_node=4`)."""
    sequence_parallel: bool = False
    """Split the activations along the sequence over the tensor parallel ranks, except in the
    tensor parallel matrix products."""
    context_parallel_size: int = 1
    """Context parallel size: the number of ranks that share each packed bin. For rows whose
    activations do not fit on one GPU."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state and the main weights over the data parallel ranks."""
    overlap_grad_reduce: bool = True
    """Overlap the gradient reduction with the backward pass (CUDA only)."""
    overlap_param_gather: bool = True
    """Overlap the gathering of updated weights with the next forward pass (CUDA with the
    distributed optimizer only)."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    silent_rank_seconds: float = 20.0
    """Seconds without a heartbeat after which a rank counts as dead. The other ranks name it and
    exit. A long computation does not interrupt the heartbeat."""


@dataclass(frozen=True)
class LimitSection:
    """Settings of every stage that can take long."""

    max_time: str | None = None
    """Wall-clock limit, as `3h50m`, `HH:MM:SS` or seconds. Before this limit, the stage saves and
    exits with 75. If unset, there is no limit."""


@dataclass(frozen=True)
class LauncherSection:
    """Who starts the ranks. The keys from `job_name` on apply to Slurm jobs."""

    kind: LauncherKind = LauncherKind.local
    """`local` starts the ranks on this machine. `slurm` submits the stage as a batch job. Choose it
    with the group: `launcher=slurm`."""
    nproc_per_node: int = 1
    """Ranks per node. Under torchrun, leave it unset or equal to torchrun's `--nproc-per-node`."""
    nodes: int = 1
    """Number of nodes. More than one needs Slurm, or torchrun on every node."""
    gpu: GpuKind | None = None
    """GPU model that `dry_run=true` estimates memory and time for. If unset, the device that this
    machine has; `h100_80gb` for several nodes, or if `run.device=cuda` and there is no GPU here."""
    job_name: str | None = None
    """Name of the Slurm job. If unset, `offline-align-<stage>`."""
    partition: str | None = None
    """Slurm partition. If unset, the default of the cluster."""
    account: str | None = None
    """Slurm account to charge. If unset, the user's default."""
    time: str | None = None
    """Time limit of one attempt, as `3h50m`, `HH:MM:SS` or `D-HH:MM:SS`. If unset, the default of
    the partition."""
    gpus_per_node: int | None = None
    """GPUs to request per node; 0 requests none. If unset, one per rank, or none with
    `run.device=cpu`."""
    cpus_per_task: int | None = None
    """CPU cores per rank. If unset, the default of the cluster."""
    container_image: str | None = None
    """Container image for the ranks, a `.sqsh` file or `registry#name:tag` (needs pyxis and
    enroot). If unset, no container."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to mount in the container, each as `source:target`. They must cover `run.dir`, the
    data and the working directory."""
    python: str | None = None
    """Python interpreter of the ranks. If unset, the one that submits the job, or `python` in the
    container."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the ranks, for example `launcher.environment.NCCL_DEBUG=INFO`."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """More sbatch options, for example `launcher.sbatch.qos=high` or
    `launcher.sbatch.exclusive=true`. They are added last."""
    dependency: str | None = None
    """Ids of jobs that must succeed first, as `12:13`. The input files that they will write need
    not exist yet."""
    check: bool = True
    """Check the nodes before a stage with several ranks starts: GPUs, network, clocks, disk and
    versions."""
    requeue: bool = True
    """Requeue the job after an early stop (exit 75) or a crash. Bad data (65) and bad settings (78)
    are never requeued."""
    attempts: int = 3
    """Give up after this many consecutive attempts that saved nothing new."""
    signal_margin_seconds: int = 300
    """How long before the time limit the ranks are told to save. Slurm may send the signal up to a
    minute earlier."""
