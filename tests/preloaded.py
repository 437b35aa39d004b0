"""A Python interpreter that has imported torch, megatron and transformers already, for tests that start processes.

Importing them takes most of the processor time of a small command. `python()` returns a program to call
instead of `sys.executable`, with `-m`, `-c` or a script. It asks a server, started once a pytest worker,
for a fork with the caller's arguments, environment, folder and open files. It passes signals to the
fork, and ends as the fork ends; if the program is killed, the server kills the fork. Children of the
fork that start `sys.executable`, such as the ranks of a launcher, are forks too.

A fork is a process of its own, so kills, ranks and exit codes are real. Three things are not, and need
`sys.executable`: imports, settings that the interpreter or a library reads when it starts, and the
hash seed, which all forks share.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import marshal
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY

CLIENT = Path(__file__).with_name("preloaded_client.py")
# Libraries open files when they are imported. The lower numbers are kept free for the callers' files.
_KEPT_FREE = 100
_FIRST_HELD_FILE = 500
_servers: dict[tuple[str, tuple[tuple[str, str], ...]], str] = {}


def python(kind: str = "cpu", **environment: str) -> str:
    """Return the path of the program.

    `kind` is a name in IMPORTS; `environment` has variables that libraries read at import.
    """
    key = kind, tuple(sorted(environment.items()))
    if key not in _servers:
        _servers[key] = _start(kind, environment)
    return _servers[key]


def scripts(folder: Path) -> Path:
    """Return a copy of the folder of scripts, in `folder`. Its `offline-align` is a preloaded program."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    # The scripts look for programs here first.
    program = programs / "offline-align"
    program.write_text(f'#!/bin/sh\nexec {python()} -m offline_align "$@"\n')
    program.chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    return shutil.copytree(REPOSITORY / "scripts", folder / "scripts")


def _start(kind: str, environment: dict[str, str]) -> str:
    folder = Path(tempfile.mkdtemp(prefix="preloaded_"))
    program = folder / "python"
    text = CLIENT.read_text().replace("SERVED: dict[str, str] = {}", f"SERVED = {environment!r}")
    program.write_text(f"#!{sys.executable} -IS\n{text}")
    program.chmod(0o755)
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.preloaded", str(folder), kind],
        # It ends when this pipe is closed, so also if this process is killed.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # One thread a process at start, as many ranks share few cores.
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    atexit.register(_stop, started)
    assert started.stdout is not None
    assert started.stdout.readline() == b"ready\n"
    return str(program)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.kill()
    server.wait()


@dataclass(frozen=True)
class Start:
    """What a caller asks for, and the connection to its program."""

    caller: socket.socket
    kind: str
    """`-m`, `-c`, or `script`."""
    what: str
    arguments: list[str]
    environment: dict[bytes, bytes]
    folder: str
    parent: int
    warnings: list[str]
    unbuffered: bool
    files: list[int]
    """Numbers of the open files in the caller."""
    held: list[int]
    """Numbers of the same files here."""


def _serve(listening: socket.socket) -> Start:
    """Fork for each request. Returns only in the forks."""
    ready = selectors.DefaultSelector()
    for file in (listening, sys.stdin):
        ready.register(file, selectors.EVENT_READ)
    forks: dict[int, tuple[int, socket.socket]] = {}
    by_caller: dict[int, int] = {}
    while True:
        for found, _ in ready.select():
            number = found.fd
            if number == listening.fileno():
                caller, _ = listening.accept()
                start = _receive(caller)
                if start is None:
                    caller.close()
                    continue
                child = os.fork()
                if child == 0:
                    # Collected later, it would close files that have its numbers by then.
                    ready.close()
                    return start
                for file in start.held:
                    os.close(file)
                handle = os.pidfd_open(child)
                forks[handle] = child, caller
                by_caller[caller.fileno()] = child
                ready.register(handle, selectors.EVENT_READ)
                ready.register(caller, selectors.EVENT_READ)
            elif number in forks:
                child, caller = forks.pop(number)
                ready.unregister(number)
                os.close(number)
                _, status = os.waitpid(child, 0)
                if by_caller.pop(caller.fileno(), None) is not None:
                    ready.unregister(caller)
                with contextlib.suppress(OSError):
                    caller.sendall(marshal.dumps(os.waitstatus_to_exitcode(status)))
                caller.close()
            elif number == sys.stdin.fileno():
                for child in by_caller.values():
                    _kill(child)
                os._exit(0)
            elif number in by_caller:
                _pass_on(found.fileobj, by_caller, ready)


def _pass_on(caller: Any, by_caller: dict[int, int], ready: selectors.BaseSelector) -> None:
    """Pass signals of a caller to its fork. If the caller has ended, so does the fork, with its children."""
    child = by_caller[caller.fileno()]
    numbers = b""
    with contextlib.suppress(OSError):
        numbers = caller.recv(64)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    if not numbers:
        del by_caller[caller.fileno()]
        ready.unregister(caller)
        _kill(child)


def _kill(fork: int) -> None:
    """Kill a fork and its children."""
    # It may not have its process group yet.
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(fork, signal.SIGKILL)


def _receive(caller: socket.socket) -> Start | None:
    head, held, _, _ = socket.recv_fds(caller, 8, 64)
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size:
        if not (piece := caller.recv(size - len(text))):
            return None
        text += piece
    return Start(caller, **marshal.loads(text), held=held) if size else None


def _become(start: Start) -> None:
    """Take over the files, folder, environment and interpreter settings of the caller."""
    os.setpgid(0, 0)
    start.caller.close()
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, _FIRST_HELD_FILE) for file in start.held]
    os.closerange(0, _KEPT_FREE)
    for file, number in zip(high, start.files, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    os.chdir(start.folder)
    served = _paths(os.environ.get("PYTHONPATH", ""))
    os.environ.clear()
    os.environb.update(start.environment)
    os.getppid = lambda: start.parent
    sys.executable = str(Path(sys.argv[1]) / "python")
    # multiprocessing starts its children with this program.
    importlib.import_module("multiprocessing").set_executable(sys.executable)
    given = _paths(os.environ.get("PYTHONPATH", ""))
    kept = [path for path in sys.path[1:] if path not in given]
    sys.path[:] = ["" if start.kind == "-c" else start.folder, *given, *kept]
    for action in start.warnings:
        warnings.simplefilter(action)  # type: ignore[arg-type]
    if start.unbuffered:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if any((Path(path) / "sitecustomize.py").exists() for path in given if path not in served):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")


def _paths(value: str) -> list[str]:
    return [str(Path(path).absolute()) for path in value.split(":") if path]


def _run(start: Start) -> int:
    """Run the program as the interpreter does, and return its exit code."""
    sys.argv = [{"-c": "-c"}.get(start.kind, start.what), *start.arguments]
    try:
        if start.kind == "-m":
            runpy.run_module(start.what, run_name="__main__", alter_sys=True)
        elif start.kind == "-c":
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(start.what, "<string>", "exec"), main.__dict__)
        else:
            sys.path[0] = str(Path(start.what).resolve().parent)
            runpy.run_path(start.what, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """End as the interpreter does, but without destroying every module, which takes long."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def import_everything() -> None:
    """Import everything that commands import, so that a fork starts at once; no import may start OpenMP threads."""
    import datasets
    import matplotlib.figure
    import megatron.core.dist_checkpointing.strategies.state_dict_saver
    import pyarrow.parquet
    import sentencepiece.sentencepiece_model_pb2
    import torch.distributed.run
    import torch.profiler
    import transformers

    from offline_align.distributed import cpu

    cpu.enable()
    for module in ("distributed.setup", "generate.transformers_engine", "model.build", "objectives.next_token"):
        importlib.import_module(f"offline_align.{module}")
    for stage in ("convert", "dry_run", "evaluate", "generate", "hub", "label", "prepare", "requirements"):
        importlib.import_module(f"offline_align.stages.{stage}")
    for module in ("stages.template_date", "stages.training", "train.saving", "train.trainer"):
        importlib.import_module(f"offline_align.{module}")
    from offline_align.stages.registry import STAGES

    # The first composition reads the plug-ins and the grammar of Hydra.
    STAGES["sft"].compose(["run.dir=unused", "model=demo", "optim.lr=1e-3"])
    del datasets, matplotlib, megatron, pyarrow, sentencepiece, torch
    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # noqa: B018


def _import_for_imagined_gpu() -> None:
    """Import what traces on `benchmarks.imagined_gpu` import. CUDA starts in the forks."""
    _skip_counting_of_devices()
    import torch

    import benchmarks.memory

    for module in ("label.scoring", "model.build", "objectives.pairwise", "train.checkpoint", "train.step"):
        importlib.import_module(f"offline_align.{module}")
    # The first composition reads the plug-ins and the grammar of Hydra.
    benchmarks.memory.llama3_8b()
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _import_for_imagined_gpu_with_engine() -> None:
    # megatron looks for Transformer Engine when it is imported.
    _skip_counting_of_devices()
    importlib.import_module("tests.engine_on_cpu").install_on_imagined_gpu()
    _import_for_imagined_gpu()


def _skip_counting_of_devices() -> None:
    """Answer as the imagined driver does. After torch has counted devices, it refuses CUDA in forks."""
    import torch

    bindings: Any = torch._C
    bindings._cuda_getDeviceCount = lambda: 1


IMPORTS = {
    "cpu": import_everything,
    "imagined_gpu": _import_for_imagined_gpu,
    "imagined_gpu_with_engine": _import_for_imagined_gpu_with_engine,
}


def main() -> None:
    """Serve in the folder that is the first argument, with the imports that the second names."""
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(3, _KEPT_FREE)]
    IMPORTS[sys.argv[2]]()
    for file in free:
        os.close(file)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(Path(sys.argv[1]) / "socket"))
        listening.listen(64)
        # The collector of a fork does not touch, and so copy, the pages of these objects.
        gc.collect()
        gc.freeze()
        os.write(1, b"ready\n")
        start = _serve(listening)
    try:
        _become(start)
        code = _run(start)
    except BaseException:
        traceback.print_exc()
        code = 1
    _end(code)


if __name__ == "__main__":
    main()
