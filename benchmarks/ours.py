"""The offline-align contenders: the real commands and parts of them."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import median_seconds, report
from benchmarks.workload import GLOBAL_BATCH, MAX_LENGTH, in_bf16

_COMMON = [
    f"data.max_length={MAX_LENGTH}",
    "data.template=paper",
    "run.device=cpu",
    "debug=true",
]
_TRAIN = [
    f"trainer.global_batch_size={GLOBAL_BATCH}",
    "trainer.max_epochs=2",
    "optim.lr=1e-4",
    "trainer.save_interval=null",
]


def _second_epoch(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of the second half of the steps. The first half is the warm-up."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    return steps[len(steps) // 2 :]


def _train(stage: str, workload: str, scratch: str, rows: str, *words: str) -> list[dict[str, Any]]:
    from offline_align.__main__ import run

    run_dir = Path(scratch) / stage
    source = f"init.from={Path(workload) / 'model'}"
    precision = f"trainer.precision={'bf16' if in_bf16(workload) else 'fp32'}"
    given = [f"run.dir={run_dir}", source, f"data.train={Path(workload) / rows}", precision]
    code = run([stage, *given, *_COMMON, *_TRAIN, *words])
    assert code == 0
    return _second_epoch(run_dir)


def _rates(steps: list[dict[str, Any]], unit: str) -> dict[str, float]:
    """Return the rates and the total memory of all ranks, including this process if it is the only rank."""
    seconds = sum(s["step_seconds"] for s in steps)
    tokens = sum(s["tokens_per_second"] * s["step_seconds"] for s in steps)
    computed = sum(s["tokens_per_second"] * s["step_seconds"] / (1 - s["padding_fraction"]) for s in steps)
    ranks = round(steps[-1]["tokens_per_second"] / steps[-1]["tokens_per_second_per_rank"])
    return {
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"] * ranks,
        unit: sum(s["count"] for s in steps) / seconds,
        "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / computed,
        "seconds": seconds,
    }


def sft(workload: str, scratch: str, rows: str, *words: str) -> None:
    """Train on packed rows, in bins of up to MAX_LENGTH tokens."""
    report(**_rates(_train("sft", workload, scratch, f"{rows}.jsonl", *words), "targets_per_second"))


def reward(workload: str, scratch: str, *words: str) -> None:
    """Train a reward model on packed pairs."""
    report(**_rates(_train("reward", workload, scratch, "pairs.jsonl", *words), "pairs_per_second"))


def dpo(workload: str, scratch: str, *words: str) -> None:
    """Train a policy on packed pairs with DPO."""
    report(**_rates(_train("dpo", workload, scratch, "pairs.jsonl", *words), "pairs_per_second"))


def dpo_and_reference(workload: str, scratch: str, *words: str) -> None:
    """Train with DPO; the time of an epoch includes the forward passes for the reference before it."""
    rates = _rates(_train("dpo", workload, scratch, "pairs.jsonl", *words), "pairs_per_second")
    extra = json.loads((Path(scratch) / "dpo" / "manifest.json").read_text(encoding="utf-8"))["extra"]
    seconds = rates["seconds"] + extra["rank_seconds"]["reference"]
    changed = {name: rates[name] * rates["seconds"] / seconds for name in ("pairs_per_second", "tokens_per_second")}
    report(**(rates | changed | {"seconds": seconds}))


def method(workload: str, scratch: str, stage: str, *words: str) -> None:
    """Train on the same rows with rewards, using the stage of a method."""
    report(**_rates(_train(stage, workload, scratch, "labelled.jsonl", *words), "targets_per_second"))


def label(workload: str, scratch: str, rows: str) -> None:
    """Score every row with a reward model: packing and forward passes with shared prompts."""
    from offline_align.config.sections import DataSection, Device, OnBadRow, ParallelSection, RunSection
    from offline_align.convert.source import open_model
    from offline_align.data.records import BadRows, Sample, read_rows
    from offline_align.distributed.setup import session
    from offline_align.label.scoring import load_reward_model, score_all, tokenized
    from offline_align.model.passes import plan_bins

    folder = Path(workload)
    reward_model = open_model(folder / "reward")
    samples = list(read_rows([folder / f"{rows}.jsonl"], Sample, BadRows(OnBadRow.fail, None)))
    with session(ParallelSection(), RunSection(dir=scratch, device=Device.cpu)) as ranks:
        model = load_reward_model(reward_model, ParallelSection(), ranks, in_bf16(workload))
        data = DataSection(max_length=MAX_LENGTH)
        source = tokenized(samples, reward_model.renderer(), data, Path(scratch), share_prompts=True)

        def score() -> dict[int, float]:
            return score_all(model, source, plan_bins(source, MAX_LENGTH), ranks)

        checksum = sum(score().values())
        seconds = median_seconds(score)
        tokens = source.num_tokens()
    report(tokens_per_second=tokens / seconds, padding=0.0, seconds=seconds, checksum=checksum)
