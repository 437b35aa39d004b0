"""Set up and tear down a rank: device, process groups, megatron's parallel state and seeds.

Every stage uses torch.distributed through `with session(...) as ranks:` and in no other way. The
ranks are those that a launcher has started, or a world of one.
"""

import contextlib
import datetime
import logging
import os
import random
import socket
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from offline_align.config.sections import Device, ParallelSection, Precision, RunSection
from offline_align.distributed.heartbeat import heartbeat
from offline_align.distributed.launched import Launcher, launched, shown
from offline_align.distributed.rendezvous import rendezvous
from offline_align.errors import AlignError, ConfigError, DataError, FailedOnMainRank
from offline_align.lineage import effort

logger = logging.getLogger(__name__)
# Long enough for a rank to write or hash a large checkpoint while the others wait. If a rank is
# lost, `heartbeat` ends the others sooner.
_TIMEOUT = datetime.timedelta(minutes=30)
# torch declares no types for its stores and streams.
_stores: Any = dist
_streams: Any = torch.cuda


@dataclass(frozen=True)
class Ranks:
    """Ranks and group sizes of this process: data (`dp`), tensor (`tp`), context (`cp`) parallel."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files that exist once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have reached the barrier."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of ranks, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> Callable[[], bool]:
        """Return a function that waits for, and returns, whether `flag` is true on any rank.

        Every rank must call this. The reduction starts at once and runs beside the kernels that are
        queued after it, so waiting for the answer does not wait for them.
        """
        vote = torch.full((1,), float(flag), device=self.device)
        asked = dist.all_reduce(vote, op=dist.ReduceOp.MAX, async_op=True)
        assert asked is not None
        # In the model's stream, reading the answer would wait for every kernel queued since.
        beside = _streams.Stream(self.device) if self.device.type == "cuda" else None

        def answer() -> bool:
            with torch.cuda.stream(beside):
                asked.wait()
                return bool(vote.item())

        return answer

    def require_same(self, value: Hashable, what: str) -> None:
        """Raise DataError on all ranks if one of them has a different `value` than rank 0.

        Ranks that read different rows would later wait for each other forever.
        """
        found = self.gather((socket.gethostname(), value))
        others = [f"rank {r} on {host}" for r, (host, seen) in enumerate(found) if seen != found[0][1]]
        if not others:
            return
        if not self.is_main:
            raise FailedOnMainRank(DataError.exit_code)
        raise DataError(
            f"{what}: {', '.join(others)} read other rows than rank 0 on {found[0][0]}; "
            "give one file on storage that all nodes share"
        )

    def from_main[T](self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all ranks.

        If it raises an AlignError, all ranks end with its exit code.
        """
        result: T | None = None
        error: AlignError | None = None
        if self.is_main:
            try:
                result = work()
            except AlignError as caught:
                error = caught
        code, value = self.broadcast((error.exit_code if error else 0, result))
        if error is not None:
            raise error
        if code:
            raise FailedOnMainRank(code)
        found: T = value
        return found

    def main_first[T](self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the other ranks, which find what rank 0 has cached.

        If rank 0 raises an AlignError, all ranks end with its exit code.
        """
        made: list[T] = []
        self.from_main(lambda: made.append(work()))
        return made[0] if made else work()


def choose_device(device: Device) -> torch.device:
    """Return the device of this rank. Raises ConfigError if CUDA is requested but not available."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: no CUDA device is visible; use run.device=cpu or auto")
    if device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether the forward pass on `device` runs in bf16; warn if bf16 is slow there."""
    found = precision.in_bf16(on_cuda=device.type == "cuda")
    if found and device.type == "cpu" and not cpu_multiplies_bf16():
        logger.warning(
            "trainer.precision=%s: this CPU has no bf16 units (AVX512-BF16 or AMX) that torch %s knows of; "
            "it emulates bf16, which is many times slower than fp32",
            precision,
            torch.__version__,
        )
    return found


def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has units for bf16 products, about twice as fast as fp32 ones."""
    # torch 2.11 has no such function.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def session(parallel: ParallelSection, run: RunSection) -> Iterator[Ranks]:
    """Set up this rank (device, process groups, parallel state, seeds) and tear it down.

    An error on one rank ends all ranks with its exit code.
    """
    device = choose_device(run.device)
    if device.type == "cpu":
        from offline_align.distributed import cpu

        cpu.enable()
        torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    else:
        torch.cuda.set_device(device)
    prefix = _init_process_group(device)
    effort.used(dist.get_world_size(), device.type)
    with heartbeat(parallel.silent_rank_seconds, prefix), _model_parallel(parallel):
        seed_everything(run.seed)
        yield _ranks(device)


@contextlib.contextmanager
def _model_parallel(parallel: ParallelSection) -> Iterator[None]:
    """Create megatron's parallel state for the block, and destroy all process groups after it.

    Destroying an NCCL group waits for the other ranks, so heartbeats continue until that is done.
    A rank that fails does not destroy its groups, because the other ranks may be in a collective.
    It does not abort them either: that would call NCCL in an unknown state, and the end of the
    process frees their resources anyway.
    """
    from megatron.core import parallel_state

    destroy = dist.get_world_size() == 1
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            # Only checkpoint formats that are not used here need gloo groups beside the NCCL ones.
            create_gloo_process_groups=False,
        )
        yield
        destroy = True
    finally:
        if destroy:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _cores() -> int:
    """Return the number of cores for this job; Slurm may allot cores without binding to them."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, int(os.environ.get("SLURM_CPUS_ON_NODE", allowed)))


def _init_process_group(device: torch.device) -> str:
    """Initialise the default process group; return the key prefix of this session in the store."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    started = launched()
    if started is not None and started.world_size > 1:
        rank, world_size = started.rank, started.world_size
        if started.launcher is Launcher.other:
            logger.info("this is rank %d of %d, as the environment says: %s", rank, world_size, shown())
        shared, prefix = rendezvous(rank, world_size, _TIMEOUT.total_seconds())
        own = _stores.PrefixStore(prefix, shared)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        return prefix
    # A world of one needs no port, because its store lives in this process.
    store = _stores.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT)
    return ""


def _ranks(device: torch.device) -> Ranks:
    from megatron.core import parallel_state as state

    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        cp_rank=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        device=device,
    )


def seed_everything(seed: int) -> None:
    """Seed Python, torch and megatron's generators, equally on all data parallel ranks."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
