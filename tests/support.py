"""Helpers shared by several tests."""

import contextlib
import os
import random
import socket
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def real_data_dir() -> Path:
    """Return the folder of real rows, or skip the test if it does not exist."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("OFFLINE_ALIGN_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set OFFLINE_ALIGN_DATA")
    return folder


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M in Hugging Face format, or skip the test if it does not exist."""
    folder = Path(os.environ.get("OFFLINE_ALIGN_SMOLLM2", REPOSITORY / "models" / "SmolLM2-135M"))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model at {folder}; set OFFLINE_ALIGN_SMOLLM2 to a Hugging Face folder of SmolLM2-135M")
    return folder


def free_ports(count: int) -> list[int]:
    """Return free ports, in increasing order, that stay free until they are used.

    They are outside the kernel's ephemeral range and the ranges of other pytest workers.
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first_given = int(given.read_text().split()[0]) if given.exists() else 32_768
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = list(range(10_000 + worker % 16, first_given, 16))
    random.SystemRandom().shuffle(ports)
    free = (port for port in ports if _is_free(port))
    return sorted(next(free) for _ in range(count))


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as tried:
        tried.bind(("", port))
        return True
    return False
