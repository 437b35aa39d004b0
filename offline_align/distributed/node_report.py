"""Reports of the ranks about their nodes before a job starts, and the problems that they show."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from offline_align.errors import AlignError, ConfigError, StorageError
from offline_align.wording import counted

LARGEST_SKEW_SECONDS = 10.0
"""With a larger clock difference, logs and file times of the nodes are misleading."""


@dataclass(frozen=True)
class NodeReport:
    """What one rank reports about its node."""

    rank: int
    host: str
    versions: dict[str, str]
    gpus: int
    clock: float
    """Seconds since the epoch, read when rank 0 asks."""
    free_bytes: int
    shares_folder: bool
    """Whether this rank sees the same run folder as rank 0."""
    problem: str | None = None
    """The error of the rank's own GPU, if it has one."""


def node_name(rank: int) -> str:
    """Return the name of a rank's node without asking the rank, which may never have started."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    names = os.environ.get("OFFLINE_ALIGN_NODES", "").split()
    node = rank // per_node
    return f"node {names[node] if node < len(names) else node}, rank {rank}"


def judge(reports: list[NodeReport], free_gib: float) -> None:
    """Raise an error for the first kind of problem in the reports, with one line a node.

    Raises ConfigError (versions, clocks, run folder), StorageError (disk space) or AlignError
    (GPUs).
    """
    for error, lines in (
        (ConfigError, list(_different_versions(reports))),
        (ConfigError, list(_different_clocks(reports))),
        (ConfigError, list(_different_folders(reports))),
        (StorageError, list(_full_disks(reports, free_gib))),
        (AlignError, list(_bad_gpus(reports))),
    ):
        if lines:
            raise error("\n".join(dict.fromkeys(lines)))


def _different_versions(reports: list[NodeReport]) -> Iterator[str]:
    for name in dict.fromkeys(n for r in reports for n in r.versions):
        seen = [r.versions.get(name, "not installed") for r in reports]
        usual = Counter(seen).most_common(1)[0][0]
        for r, version in zip(reports, seen, strict=True):
            if version != usual:
                yield f"{_name(r)}: {name} is {version}, elsewhere {usual}; install the same everywhere"


def _different_clocks(reports: list[NodeReport]) -> Iterator[str]:
    middle = sorted(r.clock for r in reports)[len(reports) // 2]
    for r in reports:
        if abs(r.clock - middle) > LARGEST_SKEW_SECONDS:
            yield f"{_name(r)}: the clock is {r.clock - middle:+.0f} s off the others; start its time service"


def _different_folders(reports: list[NodeReport]) -> Iterator[str]:
    for r in reports:
        if not r.shares_folder:
            yield f"{_name(r)}: run.dir is not the folder that rank 0 sees; use storage that all nodes share"


def _full_disks(reports: list[NodeReport], free_gib: float) -> Iterator[str]:
    for r in reports:
        if r.free_bytes < free_gib * 2**30:
            yield f"{_name(r)}: {r.free_bytes / 2**30:.1f} GiB free for run.dir; at least {free_gib:g} GiB are needed"


def _bad_gpus(reports: list[NodeReport]) -> Iterator[str]:
    most = max(r.gpus for r in reports)
    for r in reports:
        if r.problem is not None:
            yield f"{_name(r)}, rank {r.rank}: {r.problem}"
        elif r.gpus < most:
            yield f"{_name(r)}: {counted(r.gpus, 'GPU')} visible, elsewhere {most}"


def _name(report: NodeReport) -> str:
    return f"{node_name(report.rank).partition(',')[0]} ({report.host})"
