"""Estimate step times from 8 to 1024 GPUs and compare with published runs: `python -m benchmarks.scaling`.

Nothing is measured here. The estimate is that of `offline_align/estimate/step_time.py`, which
`dry_run=true` prints too.
"""

import argparse
from pathlib import Path

from benchmarks.projection import LLAMA_8B, PUBLISHED_A100_HOURS, hours
from offline_align.config.sections import ParallelSection
from offline_align.estimate.hardware import NODES
from offline_align.estimate.sizes import ParallelSizes
from offline_align.estimate.step_time import COMPUTE_SHARE, Work, step_time

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TENSOR = (1, 2, 4, 8)
ROWS_PER_GPU, LENGTH = 4, 4096
# Llama 3 8B, SFT, packed to 4096, TP 1, bf16 (NVIDIA, dgxc-benchmarking): 1.32 and 1.33 s per step of 4
# rows per GPU.
PUBLISHED = {"h100_80gb": {8: 4 * 4096 / 1.32, 32: 4 * 4096 / 1.33}, "a100_80gb": {}}


def rate(gpu: str, gpus: int, tensor: int) -> float:
    """Return the tokens per second and GPU, for weak scaling with full rows and gradients in bf16."""
    rows = ROWS_PER_GPU * gpus
    work = Work(rows * LENGTH, rows * LENGTH**2, rows * LENGTH, LENGTH)
    parallel = ParallelSection(
        tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1, grad_reduce_in_fp32=False
    )
    seconds = step_time(LLAMA_8B, parallel, ParallelSizes(gpus, tensor, 1), work, NODES[gpu]).total
    return work.tokens / seconds / gpus


def draw(path: Path) -> None:
    """Draw the rates of both kinds of node, with one line per tensor parallel size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, gpu in zip(axes, ("a100_80gb", "h100_80gb"), strict=True):
        for tensor in TENSOR:
            axis.plot(GPUS, [rate(gpu, n, tensor) for n in GPUS], marker="o", markersize=3, label=f"TP {tensor}")
        if PUBLISHED[gpu]:
            axis.plot(*zip(*PUBLISHED[gpu].items(), strict=True), "k*", markersize=10, label="published, TP 1")
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [str(n) for n in GPUS])
        axis.set_ylim(bottom=0)
        axis.set_title(f"DGX {NODES[gpu].gpu}")
        axis.set_xlabel("GPUs")
        axis.legend(loc="lower left", fontsize=8)
    axes[0].set_ylabel("tokens/s on each GPU (arithmetic)")
    figure.suptitle("SFT of an 8 B model, 4 rows of 4,096 tokens a GPU and step")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def table() -> list[str]:
    """Return a Markdown table of the tokens per second and GPU."""
    lines = ["| node | TP | " + " | ".join(map(str, GPUS)) + " |", "|---" * (len(GPUS) + 2) + "|"]
    for gpu in ("a100_80gb", "h100_80gb"):
        for tensor in TENSOR:
            cells = " | ".join(f"{rate(gpu, n, tensor):,.0f}" for n in GPUS)
            lines.append(f"| {NODES[gpu].gpu} | {tensor} | {cells} |")
    return lines


def projected() -> list[str]:
    """Return the projected hours of the paper's Table 3 at the MFU that the estimate assumes."""
    found = {(g, n): hours(g, n, COMPUTE_SHARE, COMPUTE_SHARE) for g in ("a100_80gb", "h100_80gb") for n in (500, 1000)}
    titles = [f"{NODES[g].gpu.split()[0]} hours at {n} tokens a row" for g, n in found]
    lines = ["| method | paper, A100 hours | " + " | ".join(titles) + " |", "|---" * (2 + len(found)) + "|"]
    for method, published in PUBLISHED_A100_HOURS.items():
        lines.append(f"| {method} | {published} | " + " | ".join(f"{v[method]:.2f}" for v in found.values()) + " |")
    return lines


def main() -> None:
    """Print both tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/scaling.png"))
    options = parser.parse_args()
    print("\n".join([*table(), "", *projected()]))
    draw(options.plot)


if __name__ == "__main__":
    main()
