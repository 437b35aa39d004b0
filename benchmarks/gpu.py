"""Benchmark one GPU: check against fp32, then compare SFT, reward model and labelling with peers.

`benchmarks/gpu.sh` sets everything up and calls this module. Each result is appended to `gpu.jsonl` at
once. The table and the figure are made from all its lines, so several calls with the same folder add
up.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import gpu_figure, gpu_table, harness
from benchmarks.gpu_table import CHECK, OUTPUTS, TASKS, Line
from benchmarks.gpu_workload import DEVICE, SMOKE
from benchmarks.harness import Contender
from offline_align.model.backend import engine_is_installed

ROWS = ("mixed",) if SMOKE else ("full", "mixed")


def contenders(backends: list[str]) -> list[tuple[str, str, Contender]]:
    """Return (task, kind of rows or model, contender) in the order of the runs."""
    found = [(CHECK, kind, _own("correctness", backend, kind)) for backend in backends for kind in OUTPUTS]
    for rows in ROWS:
        for prompts, title in (("once", ""), ("apart", ", a prompt an answer")):
            found.append(("answers", rows, _own("answers", backends[-1], rows, prompts, title=title)))
    for task in ("sft", "reward", "label"):
        for rows in ROWS:
            found += [(task, rows, _own(task, backend, rows)) for backend in backends]
            if task == "reward":
                found.append((task, rows, _own(task, backends[-1], rows, "apart", title=", a prompt an answer")))
            found.append((task, rows, Contender("transformers", "gpu_peers", task, arguments=(rows,))))
            if task == "label" and importlib.util.find_spec("vllm") is not None:
                found.append((task, rows, Contender("vLLM", "gpu_peers", "vllm_label", arguments=(rows,))))
    fp8 = [b for b in backends if b == "transformer_engine"]
    return found + [("fp8", rows, _own("sft", b, rows, "fp8", title=", fp8")) for b in fp8 for rows in ROWS]


def _own(function: str, backend: str, *arguments: str, title: str = "") -> Contender:
    name = f"offline-align, {backend}{title}"
    return Contender(name, "gpu_ours", function, ours=True, arguments=(backend, *arguments))


def main() -> None:
    """Measure the requested results that are missing and print the table of all. Exits with 1 if a check failed."""
    options = _options()
    options.results.mkdir(parents=True, exist_ok=True)
    # If a time limit ends this process, the running contender must release the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    machine = _machine()
    for task, rows, contender in contenders(_backends()):
        if task in options.task and any(word in contender.name for word in options.only):
            backend = contender.arguments[0] if contender.ours else ""
            facts = {"machine": machine, "task": task, "rows": rows, "contender": contender.name, "backend": backend}
            _take(contender, facts, options)
    lines = _write_table(options.results)
    gpu_figure.draw([line for line in lines if line["machine"] == machine], options.results / "gpu.png")
    print(f"\n{gpu_table.text(lines)}")
    raise SystemExit(bool(gpu_table.failed_backends(line for line in lines if line["machine"] == machine)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--only", nargs="+", default=[""], help="only contenders whose names contain one of these")
    parser.add_argument("--again", action="store_true", help="also run contenders that have results already")
    parser.add_argument("--timeout-seconds", type=float, default=300, help="limit for each contender")
    return parser.parse_args()


def _backends() -> list[str]:
    has_engine = not SMOKE and engine_is_installed()
    return ["torch", "transformer_engine"] if has_engine else ["torch"]


def _take(contender: Contender, facts: Line, options: argparse.Namespace) -> None:
    """Run a contender and append its line, unless the line exists or its backend failed the check here."""
    lines = gpu_table.read(options.results / "gpu.jsonl")
    here = [line for line in lines if line["machine"] == facts["machine"]]
    title = f"{facts['task']}  {facts['rows']}  {contender.name}"
    if not options.again and gpu_table.key(facts) in map(gpu_table.key, here):
        print(f"{title}  is there already", flush=True)
        return
    if facts["task"] != CHECK and facts["backend"] in gpu_table.failed_backends(here):
        print(f"{title}  left out: its backend failed its check", flush=True)
        return
    found = _result(contender, options.results / "gpu.log", options.timeout_seconds)
    print(title, *found.values(), sep="  ", flush=True)
    with (options.results / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts | found) + "\n")
    _write_table(options.results)


def _result(contender: Contender, log: Path, timeout_seconds: float) -> dict[str, Any]:
    """Return the `values` of a contender, or the `failure` that ended it."""
    # The published run of this shape with 56 % MFU sets this as well.
    settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    settings |= {"SMOKE": os.environ.get("SMOKE", "")}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return {"values": harness.run(contender, Path(scratch), Path(scratch), log, settings, timeout_seconds)}
        except harness.ContenderFailed as error:
            return {"failure": str(error)}


def _write_table(results: Path) -> list[Line]:
    lines = gpu_table.read(results / "gpu.jsonl")
    (results / "gpu.md").write_text(gpu_table.text(lines) + "\n", encoding="utf-8")
    return lines


def _machine() -> str:
    facts = harness.machine()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    if DEVICE.type == "cpu":
        return f"{facts['processor']}; {versions}; smoke test: the figures mean nothing"
    # Do not ask torch, which would keep a CUDA context on the GPU while the contenders run.
    command = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = done.stdout.partition("\n")[0]
    return f"{first or 'unknown GPU'} (driver, power limit); {versions}"


if __name__ == "__main__":
    main()
