"""The device that a dry run plans for: the one that the command would use, or the one that is asked for."""

from dataclasses import dataclass

from offline_align.config.compose import world_size
from offline_align.config.runs import ModelRun
from offline_align.config.sections import Device, GpuKind, LauncherKind
from offline_align.estimate import host
from offline_align.estimate.hardware import NODES, Node


@dataclass(frozen=True)
class PlannedDevice:
    """The device of every rank."""

    text: str
    """What it is, and why the plan is for it."""
    on_cuda: bool
    memory_bytes: float | None
    """Memory of one rank; None if it is not known."""
    node: Node | None = None
    """The rates of a known GPU."""
    ranks: int = 1
    """Ranks that share a CPU."""

    @property
    def product_flops(self) -> float | None:
        """FLOP/s of the matrix products of one rank on the CPU of this machine; None for a GPU."""
        return None if self.on_cuda else host.product_flops() / self.ranks


def planned_device(config: ModelRun) -> PlannedDevice:
    """Return the device for which to plan a run.

    `run.device=cpu` and `launcher.gpu` decide. Otherwise it is the device of this machine if the run
    would start here, and the default GPU if it would start on other machines.
    """
    launcher, device = config.launcher, config.run.device
    if device is Device.cpu:
        return _cpu(config, "run.device=cpu")
    if launcher.gpu is not None:
        return _known(NODES[launcher.gpu.value], "launcher.gpu")
    elsewhere = launcher.nodes > 1 or launcher.kind is LauncherKind.slurm
    gpu = None if elsewhere else host.first_gpu()
    if gpu is not None:
        return PlannedDevice(f"{gpu.name} of this machine", True, gpu.memory_bytes, gpu.node)
    if elsewhere or device is Device.cuda:
        return _known(NODES[GpuKind.h100_80gb.value], "launcher.gpu is not set")
    return _cpu(config, "no GPU here; launcher.gpu plans for one")


def _known(node: Node, why: str) -> PlannedDevice:
    return PlannedDevice(f"{node.gpu} ({why})", True, node.memory_bytes, node)


def _cpu(config: ModelRun, why: str) -> PlannedDevice:
    here = config.launcher.nproc_per_node
    ranks = max(1, min(here, world_size(here, config.launcher.nodes)))
    cores = host.cores()
    plural = "" if cores == 1 else "s"
    text = f"CPU of this machine, {cores} core{plural} ({why})"
    return PlannedDevice(text, False, host.memory_bytes() / ranks, ranks=ranks)
