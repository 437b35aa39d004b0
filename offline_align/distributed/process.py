"""Which process, on which machine, and whether it still lives."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine or another one, as it writes itself down."""

    host: str
    machine: str
    """Boot and process namespace: process numbers mean the same where it is equal."""
    pid: int
    born: str
    """Start of the process in ticks after the boot, since numbers of processes are used again."""

    @classmethod
    def this(cls) -> "Process":
        """Return the process that runs this."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, born(pid) or "")

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, of which the system knows whether it lives."""
        return self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether it is of this machine and known to be gone."""
        return self.is_here and born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def born(pid: int) -> str | None:
    """Return the start of a process of this machine in ticks after the boot, or None where it has ended."""
    try:
        # The name stands in brackets and may hold anything; state and the rest follow it.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def seconds_since_birth(pid: int) -> float:
    """Return how long a process of this machine has been there; 0 where the system does not tell."""
    ticks = born(pid)
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
