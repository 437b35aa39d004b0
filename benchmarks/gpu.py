"""One GPU: correctness against fp32, SFT, reward model and labelling beside the peers, in one table.

Called by `benchmarks/gpu.sh`, which sets everything up.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu_workload import DEVICE, SMOKE
from benchmarks.harness import Contender
from benchmarks.projection import table_3_lines
from offline_align.model.backend import engine_is_installed

CHECK, SFT, REWARD, LABEL = "correctness against fp32", "SFT, 8 layers", "reward model, 8 layers", "labelling, 8 B"
# bf16 has 8 bits of mantissa: two layers of it stay well within these.
LARGEST_ERROR, SMALLEST_COSINE = 0.01, 0.99


def contenders(backends: list[str]) -> list[tuple[str, str, Contender]]:
    """Return (task, kind of rows, contender) in the order of the table."""
    found = [
        (CHECK, "", Contender(f"offline-align, {b}, {title}", "gpu_ours", "correctness", arguments=(b, kind)))
        for b in backends
        for kind, title in (("policy", "likelihoods"), ("reward_model", "scores with shared prompts"))
    ]
    peers = {SFT: "sft", REWARD: "reward", LABEL: "label"}
    for task, function in peers.items():
        for rows in ("mixed",) if SMOKE else ("full", "mixed"):
            own = (Contender(f"offline-align, {b}", "gpu_ours", function, arguments=(b, rows)) for b in backends)
            found += [(task, rows, c) for c in own]
            if task == REWARD:
                apart = (f"offline-align, {backends[-1]}, a prompt an answer", (backends[-1], rows, "apart"))
                found.append((task, rows, Contender(apart[0], "gpu_ours", function, arguments=apart[1])))
            found.append((task, rows, Contender("transformers", "gpu_peers", function, arguments=(rows,))))
            if task == LABEL:
                found.append((task, rows, Contender("vLLM", "gpu_peers", "vllm_label", arguments=(rows,))))
    return found


def main() -> None:
    """Measure everything, print the table, write `gpu.md` and `gpu.json`; exit 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    log = options.results / "gpu.log"
    log.unlink(missing_ok=True)
    found: list[tuple[str, str, str, dict[str, float] | str]] = []
    for task, rows, contender in contenders(_backends()):
        found.append((task, rows, contender.name, _result(contender, log)))
        print(*found[-1], sep="  ", flush=True)
    text = "\n".join([_machine(), "", *_table(found), "", *_checks(found), *table_3_lines(_measured(found))])
    (options.results / "gpu.md").write_text(text + "\n", encoding="utf-8")
    (options.results / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}")
    raise SystemExit(any("FAILED" in line for line in _checks(found)))


def _backends() -> list[str]:
    has_engine = not SMOKE and engine_is_installed()
    return ["torch", "transformer_engine"] if has_engine else ["torch"]


def _result(contender: Contender, log: Path) -> dict[str, float] | str:
    if contender.name == "vLLM" and importlib.util.find_spec("vllm") is None:
        return "not installed"
    # What the published 56 % run of this shape sets too.
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    settings |= {"SMOKE": os.environ.get("SMOKE", "")}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return harness.run(contender, Path(scratch), Path(scratch), log, settings)
        except SystemExit as error:
            return str(error)


def _table(found: list[tuple[str, str, str, dict[str, float] | str]]) -> list[str]:
    titles = ("task", "rows", "contender", "tokens/s", "MFU", "p95 / median", "GPU memory")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for task, rows, name, values in found:
        if task == CHECK:
            continue
        if isinstance(values, str):
            lines.append(f"| {task} | {rows} | {name} | {values} | | | |")
            continue
        mfu = f"{values['mfu']:.1%}" if "mfu" in values else "peak not known"
        memory = f"{values['gpu_memory_bytes'] / 2**30:.1f} GiB"
        rate, spread = f"{values['tokens_per_second']:,.0f}", f"{values['p95_over_median']:.2f}"
        lines.append(f"| {task} | {rows} | {name} | {rate} | {mfu} | {spread} | {memory} |")
    return lines


def _checks(found: list[tuple[str, str, str, dict[str, float] | str]]) -> list[str]:
    lines = []
    for task, _, name, values in found:
        if task != CHECK:
            continue
        if isinstance(values, str):
            lines.append(f"{CHECK}, {name}: FAILED: {values}")
            continue
        error, cosine = values["relative_error"], values["gradient_cosine"]
        verdict = "passed" if error < LARGEST_ERROR and cosine > SMALLEST_COSINE else "FAILED"
        lines.append(f"{CHECK}, {name}: {verdict}: outputs differ by {error:.2e}, gradients' cosine {cosine:.6f}")
    return lines


def _measured(found: list[tuple[str, str, str, dict[str, float] | str]]) -> tuple[float, float] | None:
    """Return the best shares of the peak of our training and of our labelling on mixed rows, or None on a CPU."""
    own = [(t, v) for t, rows, n, v in found if isinstance(v, dict) and rows == "mixed" and n.startswith("offline")]
    best = {task: max((v.get("mfu", 0.0) for t, v in own if t == task), default=0.0) for task in (SFT, LABEL)}
    return (best[SFT], best[LABEL]) if all(best.values()) else None


def _machine() -> str:
    import torch

    facts = harness.machine()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else facts["processor"]
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    driver = ""
    if DEVICE.type == "cuda":
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        driver = f", driver and power limit {done.stdout.strip()}"
    return f"{name}{driver}; torch {facts['torch']}, transformers {facts['transformers']}" + (
        "; smoke test: the figures mean nothing" if SMOKE else ""
    )


if __name__ == "__main__":
    main()
