"""Where a command runs: folder, device, ranks, nodes and time."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Device(StrEnum):
    """Where tensors live: `auto` takes CUDA where a device is visible."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LauncherKind(StrEnum):
    """Who starts the ranks: this machine, or Slurm on the nodes that it gives to the job."""

    local = "local"
    slurm = "slurm"


class GpuKind(StrEnum):
    """GPUs of DGX nodes, for plans."""

    a100_40gb = "a100_40gb"
    a100_80gb = "a100_80gb"
    h100_80gb = "h100_80gb"
    h200_141gb = "h200_141gb"


@dataclass(frozen=True)
class RunSection:
    """Where a run lives and what makes it repeatable."""

    dir: str = MISSING
    """Folder that receives everything the stage writes; nothing is written anywhere else."""
    seed: int = 1234
    """Seed of initialisation, data order, splits and sampling."""
    device: Device = Device.auto
    """`auto`, `cpu` or `cuda`."""


@dataclass(frozen=True)
class ParallelSection:
    """Layout of the ranks; data parallel is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (paper: 4, as `parallel=tp4 launcher.nproc_per_node=4`)."""
    sequence_parallel: bool = False
    """Split activations between tensor parallel ranks along the sequence outside the matrix products."""
    context_parallel_size: int = 1
    """Ranks that share each packed bin: for rows whose activations are too large for one GPU."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state and main weights over data parallel ranks."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass goes on (CUDA only)."""
    overlap_param_gather: bool = True
    """Gather updated weights while the next forward pass goes on (CUDA, distributed optimizer)."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    silent_rank_seconds: float = 20.0
    """Seconds after which a rank that has died or stands still is named and all others end; long work is no silence."""


@dataclass(frozen=True)
class LimitSection:
    """What every stage that may take long can set."""

    max_time: str | None = None
    """Wall-clock limit, as `3h50m`, `HH:MM:SS` or seconds: save and exit 75 before it; unset: none."""


@dataclass(frozen=True)
class LauncherSection:
    """Who starts the ranks: this machine, or a Slurm job. Keys from `job_name` on are those of the job."""

    kind: LauncherKind = LauncherKind.local
    """`local`, or `slurm`: the stage becomes a batch job. Chosen by the group, `launcher=slurm`."""
    nproc_per_node: int = 1
    """Ranks on each node; under torchrun leave it unset, or at torchrun's own number."""
    nodes: int = 1
    """Nodes; more than one are started by Slurm, or by torchrun on each of them."""
    gpu: GpuKind = GpuKind.h100_80gb
    """GPUs that `dry_run=true` plans for: `a100_40gb`, `a100_80gb`, `h100_80gb` or `h200_141gb`."""
    job_name: str | None = None
    """Name in the queue; unset: `offline-align-<stage>`."""
    partition: str | None = None
    """Partition; unset: the cluster's default."""
    account: str | None = None
    """Account that is charged; unset: the user's default."""
    time: str | None = None
    """Limit of one attempt, as `3h50m`, `HH:MM:SS` or `D-HH:MM:SS`; unset: the partition's default."""
    gpus_per_node: int | None = None
    """GPUs asked for on each node; unset: one a rank, none with `run.device=cpu`; 0: none."""
    cpus_per_task: int | None = None
    """CPU cores of each rank; unset: the cluster's default."""
    container_image: str | None = None
    """Image that pyxis and enroot run the ranks in, a `.sqsh` file or `registry#name:tag`; unset: none."""
    container_mounts: list[str] = field(default_factory=list)
    """What the container sees of the storage, each `source:target`; must cover `run.dir`, data and the work folder."""
    python: str | None = None
    """Python of the ranks; unset: the one that submits, or `python` of the image."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the ranks, as `launcher.environment.NCCL_DEBUG=INFO`."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, as `launcher.sbatch.qos=high` or `launcher.sbatch.exclusive=true`; they come last."""
    dependency: str | None = None
    """Jobs that must end well first, as `12:13`; files that they are to write need not be there yet."""
    check: bool = True
    """Check the nodes before a stage of several ranks: GPUs, network, clocks, disk and versions."""
    requeue: bool = True
    """Start again after an early stop (75) or a crash; bad data (65) and bad settings (78) never do."""
    attempts: int = 3
    """Attempts in a row that save nothing new before the job is given up."""
    signal_margin_seconds: int = 300
    """How long before the limit the ranks are told to save; Slurm may do so up to a minute earlier."""
