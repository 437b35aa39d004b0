"""A disk that fails at the n-th change, for whole commands: a server that has everything imported forks one each.

Run as a module it is that server: one JSON request a line, one JSON reply a line. It needs a C compiler.
"""

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

SOURCE = Path(__file__).with_name("failing_disk.c")
NEVER = 1 << 40


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it said on stderr, and how often it changed a file."""

    code: int
    said: str
    changes: int


class FailingDisk:
    """Runs commands of offline-align on a disk that fails below `root`."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.root, self._said = root, folder / "said"
        library = folder / "failing_disk.so"
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "FAILING_DISK": str(library), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.disk"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "FailingDisk":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait()

    def run(self, words: list[str], failing: int = NEVER, error: int = 0, times: int = NEVER) -> Ended:
        """Run a command; changes number `failing` (from 0) and the `times - 1` after it fail with `error`."""
        request = [words, str(self.root), failing, error, times, str(self._said)]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code, changes = json.loads(self._server.stdout.readline())
        return Ended(code, self._said.read_text(errors="replace"), changes)


def _serve(requests: IO[str], replies: IO[str]) -> None:
    library = ctypes.CDLL(os.environ["FAILING_DISK"])
    library.changes.restype = ctypes.c_long
    library.fail_from.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_long]
    _import_everything()
    for line in requests:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os._exit(_run(library, writing, *json.loads(line)))
        os.close(writing)
        changes = int(os.fdopen(reading).read() or -1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        replies.write(json.dumps([code, changes]) + "\n")
        replies.flush()


def _run(library: Any, writing: int, words: list[str], root: str, first: int, error: int, times: int, said: str) -> int:
    from offline_align.__main__ import run

    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    library.fail_from(root.encode(), first, error, times)
    code = run(words)
    os.write(writing, str(library.changes()).encode())
    sys.stdout.flush()
    return code


def _import_everything() -> None:
    """Import what commands import, so that a forked one starts at once; nothing may start a thread."""
    import datasets
    import matplotlib.figure
    import pyarrow.parquet
    import sentencepiece
    import transformers

    from offline_align.distributed import cpu

    cpu.enable()
    import offline_align.generate.transformers_engine
    import offline_align.model.build
    import offline_align.stages.convert
    import offline_align.stages.evaluate
    import offline_align.stages.generate
    import offline_align.stages.label
    import offline_align.stages.prepare
    import offline_align.train.checkpoint
    import offline_align.train.trainer  # noqa: F401

    del datasets, matplotlib, pyarrow, sentencepiece
    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # noqa: B018


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
