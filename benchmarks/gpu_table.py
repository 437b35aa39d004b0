"""The results of one GPU as text: a table, the checks, and the projected hours of the paper's Table 3."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.projection import table_3_lines

Line = dict[str, Any]
"""A line of `gpu.jsonl`: machine, task, rows, contender, our backend, and `values` or `failure`."""

CHECK = "check"
TASKS = {
    CHECK: "correctness against fp32",
    "sft": "SFT, 8 layers",
    "answers": "SFT on two answers a prompt, 8 layers",
    "reward": "reward model, 8 layers",
    "label": "labelling, 8 B",
    "fp8": "SFT in fp8, 8 layers (MFU of bf16)",
}
OUTPUTS = {"policy": "likelihoods", "reward_model": "scores with shared prompts"}
# bf16 has 8 bits of mantissa. Likelihoods of two layers differ by about 0.001 (torch backend on the
# CPU). The terms of a score of a small random reward model nearly cancel, which gives 0.011.
LARGEST_ERROR, SMALLEST_COSINE = {"policy": 0.01, "reward_model": 0.03}, 0.99


def read(file: Path) -> list[Line]:
    """Return the newest result of every contender on every machine, in the order of the table."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = {key(line): line for line in map(json.loads, text.splitlines())}
    return sorted(found.values(), key=lambda line: (list(TASKS).index(line["task"]), line["rows"]))


def key(line: Line) -> tuple[str, ...]:
    """Return the key of a line. A line replaces earlier ones with the same key."""
    return line["machine"], line["task"], line["rows"], line["contender"]


def failed_backends(lines: Iterable[Line]) -> set[str]:
    """Return our backends that differ from fp32 or whose check failed to run."""
    return {line["backend"] for line in lines if line["task"] == CHECK and not _passed(line)}


def text(lines: list[Line]) -> str:
    """Return one section per machine, since figures of different machines are not comparable."""
    machines = dict.fromkeys(line["machine"] for line in lines)
    return "\n\n".join(_section(m, [line for line in lines if line["machine"] == m]) for m in machines)


def _section(machine: str, lines: list[Line]) -> str:
    return "\n".join([machine, "", *_table(lines), "", *_checks(lines), *table_3_lines(_measured(lines))])


def _table(lines: list[Line]) -> list[str]:
    titles = ("task", "rows", "contender", "tokens/s", "MFU", "p95 / median", "GPU memory")
    found = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for line in lines:
        if line["task"] != CHECK:
            cells = (TASKS[line["task"]], line["rows"], line["contender"], *_cells(line))
            found.append(f"| {' | '.join(cells)} |")
    return found


def _cells(line: Line) -> tuple[str, ...]:
    if "failure" in line:
        return line["failure"].replace("|", "/"), "", "", ""
    values = line["values"]
    mfu = f"{values['mfu']:.1%}" if "mfu" in values else "peak not known"
    memory = values.get("gpu_memory_bytes")
    return (
        f"{values['tokens_per_second']:,.0f}",
        mfu,
        f"{values['p95_over_median']:.2f}",
        f"{memory / 2**30:.1f} GiB" if memory else "",
    )


def _passed(line: Line) -> bool:
    values = line.get("values")
    if values is None:
        return False
    close = values["relative_error"] < LARGEST_ERROR[line["rows"]]
    return bool(close and values["gradient_cosine"] > SMALLEST_COSINE)


def _checks(lines: list[Line]) -> list[str]:
    """Return the result of each check, and which backends failed or have no check."""
    found = [_verdict(line) for line in lines if line["task"] == CHECK]
    failed = failed_backends(lines)
    found += [f"{backend}: FAILED its check, so that its contenders are left out" for backend in sorted(failed)]
    checked = {line["backend"] for line in lines if line["task"] == CHECK}
    unchecked = {line["backend"] for line in lines if line["backend"]} - checked
    return found + [f"{backend}: not checked against fp32 (--task check)" for backend in sorted(unchecked)]


def _verdict(line: Line) -> str:
    title = f"{TASKS[CHECK]}, {line['contender']}, {OUTPUTS[line['rows']]}"
    if "failure" in line:
        return f"{title}: FAILED: {line['failure']}"
    verdict, values = "passed" if _passed(line) else "FAILED", line["values"]
    error, cosine = values["relative_error"], values["gradient_cosine"]
    return f"{title}: {verdict}: outputs differ by {error:.2e}, gradients' cosine {cosine:.6f}"


def _measured(lines: list[Line]) -> tuple[float, float] | None:
    """Return our best MFU in training and in labelling on mixed rows, or None if one is missing."""
    own = [line for line in lines if line["backend"] and line["rows"] == "mixed" and "values" in line]
    best = {t: max((v["values"].get("mfu", 0.0) for v in own if v["task"] == t), default=0.0) for t in ("sft", "label")}
    return (best["sft"], best["label"]) if all(best.values()) else None
