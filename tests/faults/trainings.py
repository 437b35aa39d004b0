"""Small runs of all training stages for the fault tests: their inputs, commands and results."""

import json
from pathlib import Path
from typing import Any

from tests.training import TINY, labelled, pairs, samples, write_jsonl

TRAINERS = ("sft", "reward", "fa", "rwr", "ca", "dpo")
# Three epochs of 14 rows (13 for fa), 4 a step: steps that span two epochs, and a short one at the end.
_WORDS = [word for word in TINY if word != "debug=true"]
_WORDS += ["trainer.global_batch_size=4", "trainer.max_epochs=3", "optim.lr=1e-2", "trainer.save_interval=2"]
_WORDS += ["trainer.eval_interval=3"]
# Metrics about time, memory and hosts, which differ from run to run.
_VARYING = ("seconds", "per_second", "memory", "mfu", "slowest")


def write_rows(folder: Path) -> None:
    """Write the input rows of all training stages."""
    write_jsonl(folder / "samples.jsonl", samples())
    write_jsonl(folder / "pairs.jsonl", pairs(14))
    write_jsonl(folder / "labelled.jsonl", labelled([-1.0, *(0.5 * (k % 7) + 0.1 for k in range(13))]))


def words(stage: str, folder: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the command of a training stage in `run_dir` on the rows in `folder`."""
    rows = folder / ({"sft": "samples", "reward": "pairs", "dpo": "pairs"}.get(stage, "labelled") + ".jsonl")
    return [stage, f"run.dir={run_dir}", f"data.train={rows}", f"data.valid={rows}", *_WORDS, *more]


def result(run_dir: Path) -> dict[str, Any]:
    """Return everything that an interruption must not change: metrics of all steps and the last checkpoint.

    Asserts that each step and each validation occurs once, in order.
    """
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    keys = [(row["step"], "valid_count" in row) for row in rows]
    assert keys == sorted(set(keys)), keys
    last = (run_dir / "checkpoints" / "latest").resolve()
    best = (run_dir / "checkpoints" / "best").resolve()
    assert best.is_dir()
    assert last == max((run_dir / "checkpoints").glob("step_*"))
    files = json.loads((last / "checkpoint.json").read_text())["files"]
    state = json.loads((last / "state.json").read_text()) | {"seconds": 0}
    return {
        "metrics": [{k: v for k, v in row.items() if not any(name in k for name in _VARYING)} for row in rows],
        # Hashes of weights and moments.
        "shards": {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")},
        "best": best.name,
        "state": state,
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").glob("step_*")),
        "leftovers": sorted(path.name for path in (run_dir / "checkpoints").glob(".*")),
    }
