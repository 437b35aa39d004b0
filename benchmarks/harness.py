"""Run contenders in turns, each in its own process, and report their medians and ratios."""

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
"""The results that each contender reported, by round."""


class ContenderFailed(SystemExit):
    """A contender ended without a result. Exits with a message that says how, unless it is caught."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work: a function that is called in a fresh process."""

    name: str
    module: str
    function: str
    ours: bool = False
    arguments: tuple[str, ...] = ()
    slow: bool = False
    """Whether its settings are far from the best, so that it runs only on request."""
    limit: bool = False
    """Whether it measures a lower bound of the time instead of doing the work."""


def report(**values: float) -> None:
    """Print the result of a contender for the harness. Adds the peak memory of this process if missing."""
    print(MARK + json.dumps({"peak_memory_bytes": peak_memory_bytes()} | values), flush=True)


def median_seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Call `work` once to warm up and `times` more; return the median of the seconds of the latter."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def peak_memory_bytes() -> int:
    """Return the peak memory of this process. `getrusage` would include the parent's memory before exec."""
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
    """Run a contender once and return its result. Its output goes to `log`.

    `environment` is added to the environment of this process; without it, GPUs are hidden. Raises
    ContenderFailed if the contender reports no result, or none within `timeout_seconds`.
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
    """Return the output, the error output and the end of a command. Kills it after the timeout."""
    # Its children, such as vLLM's engine, must end with it, since they hold its pipes and the GPU.
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
    """Return the last line that names an exception, since warnings may follow it, else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (named or lines or [""])[-1]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, since the patches for megatron on the CPU cannot be undone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def one_round(contenders: list[Contender], workload: Path, scratch: Path, title: str) -> dict[str, dict[str, float]]:
    """Run every contender once and return the result of each."""
    found = {}
    for contender in contenders:
        folder = Path(tempfile.mkdtemp(prefix=f"{contender.function}_", dir=scratch))
        found[contender.name] = result = run(contender, workload, folder, scratch / "log.txt")
        shown = ", ".join(f"{k} {v:,.4g}" for k, v in result.items())
        print(f"{title}  {contender.name:44s} {shown}", flush=True)
    return found


def rounds(contenders: list[Contender], count: int, workload: Path, scratch: Path) -> Found:
    """Run all contenders in turns for `count` rounds, so that a slow minute affects all of them."""
    done = [one_round(contenders, workload, scratch, f"round {n + 1}/{count}") for n in range(count)]
    return {c.name: [found[c.name] for found in done] for c in contenders}


def medians(found: Found) -> dict[str, dict[str, float]]:
    """Return the median of every figure of every contender."""
    return {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in found.items()
    }


def ratios(contenders: list[Contender], found: Found, rate: str) -> dict[str, float]:
    """Return the speedup of our faster contender over each contender, as the median over the rounds.

    The contenders of one round run minutes apart, so slow hours of the machine do not affect the ratio.
    """
    middle = medians(found)
    own = max((c.name for c in contenders if c.ours), key=lambda name: middle[name][rate])
    return {
        name: statistics.median(a[rate] / b[rate] for a, b in zip(found[own], results, strict=True))
        for name, results in found.items()
    }


def table(contenders: list[Contender], found: Found, rate: str, unit: str) -> str:
    """Return a Markdown table with median rates, our speedup over each peer, padding and memory."""
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
    """Return lines that compare our faster contender with the fastest peer and with the limit."""
    peers = [c.name for c in contenders if not (c.ours or c.limit)]
    closest = min(peers, key=ratio.__getitem__, default=None)
    lines = [] if closest is None else [f"Against the fastest peer ({closest}): {ratio[closest]:.2f}x."]
    return lines + [f"Share of the time that is {c.name}: {ratio[c.name]:.0%}." for c in contenders if c.limit]


def machine() -> dict[str, Any]:
    """Return the facts that the figures depend on: processor, cores and versions."""
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
