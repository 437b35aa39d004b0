"""The advice of `dry_run=true` on the layout: its time and memory, and a faster layout if any."""

from offline_align.config.compose import world_size
from offline_align.config.runs import TrainRun
from offline_align.config.sections import ModelSection
from offline_align.estimate.hardware import Node
from offline_align.estimate.sizes import ModelSizes
from offline_align.estimate.step_time import Layout, StepTime, Work, fastest_layout, label_seconds, layout

_GIB = 2**30
# Smaller gains are within the error of the estimate.
_SMALLEST_GAIN = 1.05


def layout_advice(config: TrainRun, model: ModelSection, sizes: ModelSizes, node: Node) -> list[tuple[str, str]]:
    """Return lines of (title, text) for training in bf16 on the GPUs of `node`s."""
    world = world_size(config.launcher.nproc_per_node, config.launcher.nodes)
    rows, length = config.trainer.global_batch_size, config.data.max_length
    work = Work(
        tokens=rows * length,
        squared_lengths=rows * length**2,
        targets=0 if sizes.scalar_head else rows * length,
        micro_batch_tokens=config.trainer.micro_batch_size * length,
        lean_optimizer=config.optim.use_precision_aware_optimizer,
    )
    recompute = config.trainer.recompute.value
    asked = layout(sizes, config.parallel, recompute, world, work, node)
    best = fastest_layout(sizes, config.parallel, recompute, world, work, node, model.query_groups)
    where = f"{world} x {node.gpu}"
    return [
        ("step time", f"about {asked.time.total:.3g} s on {where}, full rows: {_parts(asked.time)} (arithmetic)"),
        ("rate", f"about {asked.tokens_per_second_per_gpu:,.0f} tokens/s on each GPU"),
        ("layout", _verdict(asked, best, where)),
    ]


def scoring_rate(node: Node, sizes: ModelSizes, length: int) -> str:
    """Return how fast one GPU scores full rows of `length` tokens, as text."""
    return f"about {length / label_seconds(sizes, length, length**2, 1, node):,.0f} tokens/s on each {node.gpu}"


def _parts(time: StepTime) -> str:
    named = {
        "compute": time.compute,
        "tensor parallel": time.tensor_communication,
        "data parallel": time.data_communication,
        "optimizer": time.optimizer,
    }
    return ", ".join(f"{name} {seconds:.2g}" for name, seconds in named.items() if seconds)


def _verdict(asked: Layout, best: Layout | None, where: str) -> str:
    if best is None:
        return f"nothing fits {where}: use more GPUs, or a smaller trainer.micro_batch_size or data.max_length"
    gain = asked.time.total / best.time.total
    words = " ".join(_changes(asked, best))
    size = f"{best.memory_bytes / _GIB:.0f} GiB a rank"
    if not asked.fits:
        needed = f"{asked.memory_bytes / _GIB:.0f} GiB a rank"
        return f"does not fit {where} ({needed}); the fastest that fits: {words} ({size})"
    if gain < _SMALLEST_GAIN:
        return f"fits {where}; none that fits is more than {_SMALLEST_GAIN - 1:.0%} faster"
    return f"fits {where}, but {words} is about {gain:.2f} times as fast ({size})"


def _changes(asked: Layout, best: Layout) -> list[str]:
    """Return the command-line words that change one layout into the other."""
    names = ("tensor_model_parallel_size", "sequence_parallel", "context_parallel_size", "use_distributed_optimizer")
    words = [
        f"parallel.{name}={str(getattr(best.parallel, name)).lower()}"
        for name in (*names, "grad_reduce_in_fp32")
        if getattr(best.parallel, name) != getattr(asked.parallel, name)
    ]
    return words + ([f"trainer.recompute={best.recompute}"] if best.recompute != asked.recompute else [])
