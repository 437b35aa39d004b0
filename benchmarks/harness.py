"""Contenders in processes of their own, in turns, and their medians and ratios."""

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MARK = "RESULT "

Found = dict[str, list[dict[str, float]]]
"""What each contender reported, round by round."""


class ContenderFailed(SystemExit):
    """A contender reported nothing: says how it ended, and ends a command that does not go on with the others."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work: a function of a module, called in a fresh process."""

    name: str
    module: str
    function: str
    ours: bool = False
    arguments: tuple[str, ...] = ()
    slow: bool = False
    """Far from the best setting: measured on request."""
    limit: bool = False
    """Not a way to do the work, but the least time that it can take."""


def report(**values: float) -> None:
    """Print the result of a contender for the harness, with the peak memory of this process if none is given."""
    print(MARK + json.dumps({"peak_memory_bytes": peak_memory_bytes()} | values), flush=True)


def median_seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Call `work` once to warm up and `times` more; return the median of their seconds."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def peak_memory_bytes() -> int:
    """Return the most memory of this program; `getrusage` would count what its parent held before it began."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def run(
    contender: Contender,
    workload: Path,
    scratch: Path,
    log: Path,
    environment: dict[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> dict[str, float]:
    """Run a contender once and return what it reported; its output goes to `log`.

    `environment` is added to this process's; without it GPUs are hidden. Raises ContenderFailed where it
    reported nothing, in `timeout_seconds` if given.
    """
    code = f"import benchmarks.{contender.module} as m; m.{contender.function}(*{[str(workload), str(scratch)]!r}"
    code += "".join(f", {a!r}" for a in contender.arguments) + ")"
    added = {"OMP_NUM_THREADS": str(os.cpu_count()), "CUDA_VISIBLE_DEVICES": ""} if environment is None else environment
    variables = os.environ | {"HF_HUB_OFFLINE": "1"} | added
    out, errors, end = _run([sys.executable, "-c", code], variables, timeout_seconds)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {contender.name} {' '.join(contender.arguments)}\n{out}\n{errors}\n")
    found = [line for line in out.splitlines() if line.startswith(MARK)]
    if not found:
        why = ": ".join(word for word in (end, _last_error(errors)) if word)
        raise ContenderFailed(f"{contender.name} failed: {why}; see {log}")
    result: dict[str, float] = json.loads(found[-1].removeprefix(MARK))
    return result


def _run(command: list[str], variables: dict[str, str], timeout_seconds: float | None) -> tuple[str, str, str]:
    """Return output, error output and how a command ended; after the timeout it is killed."""
    # Its children, such as vLLM's engine, must end with it: they hold its pipes and the GPU.
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout_seconds)
            end = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            end = f"not done after {timeout_seconds:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return out, errors, end


def _last_error(errors: str) -> str:
    """Return the last line that names an exception, else the last one: warnings may follow at the end of a process."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines or [""])[-1]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process: what lets megatron run on the CPU stays in a process for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def one_round(contenders: list[Contender], workload: Path, scratch: Path, title: str) -> dict[str, dict[str, float]]:
    """Run every contender once and return what each reported."""
    found = {}
    for contender in contenders:
        folder = Path(tempfile.mkdtemp(prefix=f"{contender.function}_", dir=scratch))
        found[contender.name] = result = run(contender, workload, folder, scratch / "log.txt")
        shown = ", ".join(f"{k} {v:,.4g}" for k, v in result.items())
        print(f"{title}  {contender.name:44s} {shown}", flush=True)
    return found


def rounds(contenders: list[Contender], count: int, workload: Path, scratch: Path) -> Found:
    """Run all contenders `count` times, in turns, so that a slow minute hits all of them."""
    done = [one_round(contenders, workload, scratch, f"round {n + 1}/{count}") for n in range(count)]
    return {c.name: [found[c.name] for found in done] for c in contenders}


def medians(found: Found) -> dict[str, dict[str, float]]:
    """Return the median of every figure of every contender."""
    return {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in found.items()
    }


def ratios(contenders: list[Contender], found: Found, rate: str) -> dict[str, float]:
    """Return how many times as fast as each contender the faster of ours is: the median over the rounds.

    Inside a round contenders run minutes apart, so that a machine that is slower for an hour changes no ratio.
    """
    middle = medians(found)
    own = max((c.name for c in contenders if c.ours), key=lambda name: middle[name][rate])
    return {
        name: statistics.median(a[rate] / b[rate] for a, b in zip(found[own], results, strict=True))
        for name, results in found.items()
    }


def table(contenders: list[Contender], found: Found, rate: str, unit: str) -> str:
    """Return a Markdown table: median rates, ratio of the faster of ours to each peer, padding and memory."""
    middle, ratio = medians(found), ratios(contenders, found, rate)
    lines = [f"| contender | {unit} | ours is | padding of computed tokens | peak memory |", "|---|---|---|---|---|"]
    for contender in contenders:
        values = middle[contender.name]
        times = "" if contender.ours else f"{ratio[contender.name]:.2f}x"
        padding = f"{values['padding']:.1%}" if "padding" in values else ""
        memory = "" if contender.limit else f"{values['peak_memory_bytes'] / 2**30:.2f} GiB"
        lines.append(f"| {contender.name} | {values[rate]:,.1f} | {times} | {padding} | {memory} |")
    return "\n".join([*lines, "", *verdicts(contenders, ratio)])


def verdicts(contenders: list[Contender], ratio: dict[str, float]) -> list[str]:
    """Return lines: how many times as fast as the fastest peer the faster of ours is, and how near the limit."""
    peers = [c.name for c in contenders if not (c.ours or c.limit)]
    closest = min(peers, key=ratio.__getitem__, default=None)
    lines = [] if closest is None else [f"Against the fastest peer ({closest}): {ratio[closest]:.2f}x."]
    return lines + [f"Share of the time that is {c.name}: {ratio[c.name]:.0%}." for c in contenders if c.limit]


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, versions."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
