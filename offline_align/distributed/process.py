"""Identify a process across machines, and tell whether it is still alive."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this or another machine, in a form that can be written to a file or store."""

    host: str
    machine: str
    """Boot id and PID namespace: process ids are comparable only if these are equal."""
    pid: int
    born: str
    """Start in clock ticks after boot, because process ids are reused."""

    @classmethod
    def this(cls) -> "Process":
        """Return the current process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, born(pid) or "")

    @property
    def is_here(self) -> bool:
        """Whether the process belongs to this machine, so that /proc shows whether it is alive."""
        return self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether the process belongs to this machine and has ended."""
        return self.is_here and born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def born(pid: int) -> str | None:
    """Return the start of a local process in clock ticks after boot, or None if it has ended."""
    try:
        # The process name is in brackets and may contain any character; the state follows it.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def seconds_since_birth(pid: int) -> float:
    """Return the age of a local process in seconds, or 0 if the system does not know it."""
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
