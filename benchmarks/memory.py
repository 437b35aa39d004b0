"""Compare the memory estimate of dry runs with a training step of 8 B parameters on an imagined GPU.

    python -m benchmarks.memory [--results FOLDER]

The step runs the real code at full size, with megatron's data parallel wrapper and distributed
optimizer. Only the values of the tensors are missing (`benchmarks/imagined_gpu.py`). It takes some
minutes on a machine without a GPU.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.imagined_gpu import environment, imagined_rank
from offline_align.config.sections import ModelSection, OptimSection, ParallelSection, Recompute
from offline_align.data.batch import PackedBatch
from offline_align.data.bins import PairSource, RowSource, SampleSource
from offline_align.data.loader import Loader
from offline_align.data.pack import padding_multiple
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows
from offline_align.estimate.sizes import ParallelSizes, model_sizes, training_memory
from offline_align.stages.registry import STAGES

_GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """Layout and settings of a step."""

    world: int = 8
    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    grad_reduce_in_fp32: bool = False
    use_distributed_optimizer: bool = True
    recompute: str = "none"
    bf16: bool = True
    kind: str = "policy"
    share_prompts: bool = False
    tokens: int = 4096
    """Tokens of a micro-batch."""

    @property
    def parallel(self) -> ParallelSection:
        """Return the layout as a section of the configuration."""
        return ParallelSection(
            tensor_model_parallel_size=self.tensor,
            context_parallel_size=self.context,
            sequence_parallel=self.sequence_parallel,
            grad_reduce_in_fp32=self.grad_reduce_in_fp32,
            use_distributed_optimizer=self.use_distributed_optimizer,
        )

    def __str__(self) -> str:
        """Return the settings that differ from the defaults, in words."""
        words = [f"TP {self.tensor}" + ("" if self.context == 1 else f", CP {self.context}")]
        words += ["sequence parallel"] if self.sequence_parallel else []
        words += ["fp32 gradients"] if self.grad_reduce_in_fp32 else []
        words += [] if self.recompute == "none" else [f"{self.recompute} recomputation"]
        words += [] if self.kind == "policy" else ["reward model"]
        return ", ".join([f"{self.world} GPUs", *words])


LAYOUTS = [
    Layout(),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=4),
    Layout(tensor=4, grad_reduce_in_fp32=True),
    Layout(tensor=4, sequence_parallel=True),
    Layout(tensor=8, sequence_parallel=True),
    Layout(tensor=4, recompute="selective"),
    Layout(tensor=4, recompute="full"),
    Layout(recompute="full"),
    Layout(tensor=2, context=2),
    Layout(world=16, tensor=4),
    Layout(kind="reward_model"),
    Layout(tensor=4, sequence_parallel=True, kind="reward_model"),
]


@dataclass(frozen=True)
class Traced:
    """Memory and work of a step."""

    planned_bytes: float
    peak_bytes: int
    """Peak memory of the second step, in which the moments exist."""
    held_bytes: int
    """Memory between steps."""
    product_flops: int
    """Floating-point operations of the matrix products in the second step."""
    waits: dict[str, int]
    """How often the host waited for the device in the second step, by line of code."""
    left_to_autograd: list[str]
    """Weight matrices whose gradient is not accumulated by the matrix product that computes it."""
    seconds: float


def llama3_8b() -> ModelSection:
    """Return the architecture of `model=llama3_8b`."""
    config: Any = STAGES["sft"].compose(["run.dir=unused", "model=llama3_8b"]).config
    section: ModelSection = config.model
    return section


def trace(model: ModelSection, layout: Layout, count: int = 2, rank: int = 0) -> Traced:
    """Run two steps of rank `rank` on an imagined GPU, with `count` full micro-batches; trace the second."""
    started = time.monotonic()
    batches = micro_batches(layout, count, rank)
    with imagined_rank(layout.parallel, layout.world, rank) as gpu:
        step = train_step(model, layout)
        step(batches, 1e-5)
        gpu.forget()
        held = gpu.held_bytes
        step(batches, 1e-5)
        seconds = time.monotonic() - started
        matrices = {name: weight for name, weight in step.model.module.named_parameters() if weight.ndim == 2}
        left = [name for name, weight in matrices.items() if not weight.grad_added_to_main_grad]
        planned = _planned(model, layout)
        return Traced(planned, gpu.peak_bytes, held, gpu.product_flops, dict(gpu.waits), left, seconds)


def micro_batches(layout: Layout, count: int, rank: int) -> list[PackedBatch]:
    """Return the micro-batches of a rank, whose number counts tensor parallel ranks first, then context."""
    cp_rank, dp_rank = rank // layout.tensor % layout.context, rank // layout.tensor // layout.context
    dp_size = layout.world // layout.tensor // layout.context
    source = _source(layout, count * dp_size)
    multiple = padding_multiple(layout.tensor, layout.context, layout.sequence_parallel)
    rows = len(source)
    loader = Loader(
        source, rows, rows, layout.tokens, 0, dp_rank, dp_size, multiple, cp_rank=cp_rank, cp_size=layout.context
    )
    return loader.step(0).micro_batches


def train_step(model: ModelSection, layout: Layout) -> Any:
    """Return the step of a randomly initialised model. Call it inside `imagined_rank`."""
    import torch

    from offline_align.model.build import build_model
    from offline_align.objectives.next_token import next_token
    from offline_align.objectives.pairwise import pairwise
    from offline_align.train.optim import build_optimizer, wrap_model
    from offline_align.train.step import TrainStep

    parallel, device = layout.parallel, torch.device("cuda", 0)
    built = build_model(layout.kind, model, parallel, device, layout.bf16, Recompute(layout.recompute))
    wrapped = wrap_model(built, parallel, True)
    optimizer = build_optimizer(wrapped, OptimSection(), parallel, layout.bf16, True)
    return TrainStep(wrapped, optimizer, next_token if layout.kind == "policy" else pairwise(), 1.0)


def _source(layout: Layout, bins: int) -> RowSource:
    """Return rows, or pairs, of several lengths that fill the given number of bins."""
    parts = [layout.tokens // 2, layout.tokens // 4, layout.tokens // 4]
    if layout.kind == "policy":
        return SampleSource(rows_of(parts * bins), layout.share_prompts)
    sides = [rows_of([n // 2 for n in parts] * bins) for _ in range(2)]
    return PairSource(
        TokenizedPairs(*sides, np.zeros(len(sides[0]), np.float32), sides[0].row_ids, {}), layout.share_prompts
    )


def rows_of(lengths: list[int]) -> TokenizedRows:
    """Return rows of the given lengths, in which all tokens but the first are targets."""
    ids = np.arange(sum(lengths), dtype=np.int32) % 64
    offsets, count = np.cumsum([0, *lengths]).astype(np.int64), len(lengths)
    starts, weights = np.ones(count, np.int32), np.ones(count, np.float32)
    return TokenizedRows(ids, offsets, starts, weights, [str(n) for n in range(count)], {}, 0)


def _planned(model: ModelSection, layout: Layout) -> float:
    assert model.vocab_size is not None
    ranks = ParallelSizes(layout.world, layout.tensor, layout.context)
    sizes = model_sizes(model, model.vocab_size, scalar_head=layout.kind == "reward_model")
    return training_memory(sizes, layout.parallel, ranks, layout.tokens, layout.bf16, layout.recompute).total


def table(found: dict[Layout, Traced]) -> str:
    """Return a Markdown table of layouts."""
    lines = ["| layout | plan | traced | traced over plan | between steps |", "|---|---|---|---|---|"]
    for layout, traced in found.items():
        sizes = [f"{n / _GIB:.2f} GiB" for n in (traced.planned_bytes, traced.peak_bytes)]
        ratio = f"{traced.peak_bytes / traced.planned_bytes:.3f}"
        lines.append(f"| {layout} | {' | '.join(sizes)} | {ratio} | {traced.held_bytes / _GIB:.2f} GiB |")
    return "\n".join(lines)


def main() -> None:
    """Trace every layout in this process, after restarting it if it does not see an imagined GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    if "imagined_gpu" not in os.environ.get("LD_PRELOAD", ""):
        variables = os.environ | environment(Path(tempfile.mkdtemp()))
        os.execve(sys.executable, [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", *sys.argv[1:]], variables)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    found = {}
    for layout in LAYOUTS:
        found[layout] = traced = trace(llama3_8b(), layout)
        print(f"{layout}: {traced.peak_bytes / _GIB:.2f} GiB, {traced.seconds:.0f} s", file=sys.stderr, flush=True)
    given.results.mkdir(parents=True, exist_ok=True)
    lines = [asdict(layout) | asdict(traced) for layout, traced in found.items()]
    (given.results / "memory.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
