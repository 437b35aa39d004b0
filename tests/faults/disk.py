"""Run whole commands on a disk that fails at the n-th change. This needs a C compiler."""

import subprocess
from pathlib import Path
from typing import Self

from tests.faults.forks import NEVER, Ended, Forks

SOURCE = Path(__file__).with_name("failing_disk.c")


class FailingDisk(Forks):
    """Run commands of offline-align on a disk that fails below `root`."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.root = root
        library = folder / "failing_disk.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        super().__init__(folder, {"LD_PRELOAD": str(library), "FAILING_DISK": str(library)})

    def __enter__(self) -> Self:
        return self

    def on_disk(self, words: list[str], failing: int = NEVER, error: int = 0, times: int = NEVER) -> Ended:
        """Run a command in which `times` changes, from number `failing` (counted from 0), fail with `error`."""
        return self.run(words, disk=(str(self.root), failing, error, times))
