"""Check the nodes of a job before it starts: `python -m offline_align.distributed.node_check RUN_DIR`.

The Slurm job or torchrun starts it as all ranks; started alone, it checks this machine. Every rank
reports about its node through a store, and rank 0 compares the reports. Then all ranks run one
all-reduce. Every wait has a time limit. Each problem is reported once, with the name of the node.
"""

import argparse
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from offline_align.distributed.launched import forget_leftovers, launched
from offline_align.distributed.node_report import NodeReport, judge, node_name
from offline_align.errors import AlignError, FailedOnMainRank, StorageError, write_error_file
from offline_align.lineage.manifest import versions
from offline_align.wording import counted

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
# Large enough to use every link of a ring, small enough to take no noticeable time.
_REDUCED_ELEMENTS = 4 * 2**20


def main(words: list[str]) -> int:
    """Run the check on this rank and return the exit code; rank 0 reports the problems."""
    parser = argparse.ArgumentParser(prog="node_check", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder, on storage that all nodes share")
    parser.add_argument("--limit", type=float, default=180.0, help="longest wait for other ranks, in seconds")
    parser.add_argument("--free-gib", type=float, default=5.0, help="required free space for the folder, in GiB")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format=f"offline-align[rank {os.environ.get('RANK', 0)}]: %(message)s")
    try:
        started = launched()
        if started is None:
            forget_leftovers()
        rank, world = (started.rank, started.world_size) if started else (0, 1)
        summary = check(arguments.run_dir, arguments.limit, arguments.free_gib, rank, world)
    except AlignError as error:
        write_error_file(error.exit_code, str(error))
        for line in str(error).splitlines():
            logger.error("error: %s", line)
        # A thread may still be waiting in a collective that never ends.
        os._exit(error.exit_code)
    if rank == 0:
        logger.info("nodes: %s", summary)
    return 0


def check(run_dir: Path, limit: float, free_gib: float, rank: int, world: int) -> str:
    """Compare all nodes, reduce a tensor over all ranks, and return a summary.

    Raises ConfigError (versions, clocks, storage that is not shared), StorageError (disk space) or
    AlignError (a missing rank, a GPU or the network). The message names the nodes on rank 0 and is
    empty on the other ranks.
    """
    store = _store(rank, world, limit)
    found: list[NodeReport] = []
    if rank:
        _report(store, rank, run_dir, limit)
    _agree(store, "report", rank, world, limit, lambda: _compare(store, run_dir, world, limit, free_gib, found))
    reduced = threading.Thread(target=_reduce, args=(store, rank, world, limit), daemon=True)
    reduced.start()
    _agree(store, "reduced", rank, world, limit, lambda: _await_reduction(store, world, limit))
    reduced.join(limit)
    _leave_together(store, rank, world)
    gpus = sum(Counter({r.host: r.gpus for r in found}).values())
    sizes = [counted(len({r.host for r in found}), "host"), counted(world, "rank"), counted(gpus, "GPU")]
    return f"{', '.join(sizes)}, one all-reduce: all good"


def _store(rank: int, world: int, limit: float) -> Any:
    """Return the store of all ranks, which rank 0 hosts unless torchrun does."""
    import torch.distributed as dist

    if world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
        store = tcp_store(address, port, world, hosts, timedelta(seconds=limit), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:  # DistStoreError and DistNetworkError are RuntimeErrors
        why = str(error).partition("\n")[0]
        reason = f"no connection to rank 0 at {address}:{port} within {limit:.0f} s: {why}"
        raise AlignError(f"{node_name(rank)}: {reason}") from error
    return dist.PrefixStore("node_check", store)  # type: ignore[attr-defined]


def _agree(store: Any, what: str, rank: int, world: int, limit: float, judge: Callable[[], None]) -> None:
    """Run `judge` on rank 0, and raise on all ranks if it raises an AlignError."""
    verdict = f"{what}/verdict"
    if rank == 0:
        try:
            judge()
        except AlignError as error:
            store.set(verdict, str(error.exit_code))
            _leave_together(store, rank, world, 3.0)
            raise
        store.set(verdict, "0")
    elif _wait_for(store, [verdict], 2 * limit):
        raise AlignError(f"{node_name(rank)}: no answer from rank 0 within {2 * limit:.0f} s")
    elif code := int(store.get(verdict)):
        _leave_together(store, rank, world)
        raise FailedOnMainRank(code)


def _compare(store: Any, run_dir: Path, world: int, limit: float, free_gib: float, found: list[NodeReport]) -> None:
    marker = run_dir / "logs" / f".check-{uuid.uuid4().hex[:8]}"
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        store.set("marker", marker.name)
        _report(store, 0, run_dir, limit)
        missing = _wait_for(store, [f"report/{r}" for r in range(world)], limit)
    except OSError as error:
        raise StorageError(f"{error.filename or run_dir}: {error.strerror or error}") from error
    finally:
        marker.unlink(missing_ok=True)
    if missing:
        ranks = [int(key.rpartition("/")[2]) for key in missing]
        raise AlignError("\n".join(f"{node_name(r)}: did not report within {limit:.0f} s" for r in ranks))
    found += [NodeReport(**json.loads(store.get(f"report/{r}"))) for r in range(world)]
    judge(found, free_gib)


def _report(store: Any, rank: int, run_dir: Path, limit: float) -> None:
    _wait_for(store, ["marker"], limit)
    clock = time.time()
    problem, gpus = _gpu_problem()
    marker = store.get("marker").decode() if store.check(["marker"]) else ""
    own = NodeReport(
        rank=rank,
        host=socket.gethostname(),
        versions=versions() | _cuda_versions(),
        gpus=gpus,
        clock=clock,
        free_bytes=shutil.disk_usage(_existing(run_dir)).free,
        shares_folder=_appears(run_dir / "logs" / marker),
        problem=problem,
    )
    store.set(f"report/{rank}", json.dumps(asdict(own)))


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Return whether a file exists or appears in time: network storage may show it late."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.resolve().parents) if p.exists())


def _cuda_versions() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"CUDA of torch": str(torch.version.cuda), "NCCL": nccl}


def _gpu_problem() -> tuple[str | None, int]:
    """Return the problem of this rank's own GPU, if any, and the number of visible GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    local, wanted = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus == 0:
        return None, 0
    if gpus < wanted:
        return f"{counted(gpus, 'GPU')} visible for {counted(wanted, 'rank')}", gpus
    try:
        square = torch.ones(1024, 1024, device=f"cuda:{local}")
        wrong = float((square @ square).sum()) != 2.0**30
    except RuntimeError as error:
        return f"GPU {local}: {str(error).partition(chr(10))[0]}", gpus
    return (f"GPU {local} computes wrongly" if wrong else None), gpus


def _reduce(store: Any, rank: int, world: int, limit: float) -> None:
    """Reduce a tensor over all ranks and write the result into the store.

    Runs in its own thread, because the all-reduce may never return.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store.set(f"entered/{rank}", "")
    try:
        group = dist.PrefixStore("reduce", store)  # type: ignore[attr-defined]
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=group, rank=rank, world_size=world, timeout=timedelta(seconds=limit))
        tensor = torch.full((_REDUCED_ELEMENTS,), float(rank + 1), device="cuda" if on_gpu else "cpu")
        dist.all_reduce(tensor)
        good = bool((tensor == world * (world + 1) / 2).all())
        store.set(f"reduced/{rank}", "" if good else "the sum over all ranks is wrong")
        dist.destroy_process_group()
    except Exception as error:  # network errors have many types
        store.set(f"reduced/{rank}", f"all-reduce: {str(error).partition(chr(10))[0]}")


def _await_reduction(store: Any, world: int, limit: float) -> None:
    """Wait for the all-reduce of all ranks.

    Raises AlignError naming the nodes that did not start it, or else those that did not finish it
    or got a wrong result.
    """
    late = _wait_for(store, [f"reduced/{r}" for r in range(world)], limit)
    absent = [r for r in range(world) if not store.check([f"entered/{r}"])]
    unfinished = absent or [int(key.rpartition("/")[2]) for key in late]
    lines = [f"{node_name(r)}: no all-reduce over {counted(world, 'rank')} within {limit:.0f} s" for r in unfinished]
    if not lines:
        said = {r: store.get(f"reduced/{r}").decode() for r in range(world)}
        lines = [f"{node_name(r)}: {text}" for r, text in said.items() if text]
    if lines:
        raise AlignError("\n".join(lines))


def _leave_together(store: Any, rank: int, world: int, seconds: float = 10.0) -> None:
    """Make rank 0 exit last, because it may host the store."""
    store.set(f"left/{rank}", "")
    if rank == 0:
        _wait_for(store, [f"left/{r}" for r in range(world)], seconds)


def _wait_for(store: Any, keys: list[str], seconds: float) -> list[str]:
    """Return the keys that do not appear in the store within `seconds`."""
    deadline = time.monotonic() + seconds
    missing = keys
    while missing := [key for key in missing if not store.check([key])]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
