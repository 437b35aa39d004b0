"""Compare the conditions of Conditional Alignment on the demo corpus, over several seeds and at equal tokens.

    scripts/pipeline.sh                                   # once: runs/sft, runs/label and runs/prepare
    python -m benchmarks.conditions --demo runs --runs runs/conditions

All policies start from the demo's SFT policy and train on its labelled rows, for the same number of steps,
with the settings of scripts/pipeline.sh. Prints the true quality (0 to 10) of the answers for the highest and
for the lowest target, with Student's intervals over the seeds. If it is interrupted, the same line continues.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offline_align.__main__ import run
from offline_align.data.demo import true_quality
from offline_align.data.records import Message
from offline_align.evaluate.parts.seeds import over_seeds

# Rewards are clipped to 1.1, so that hundreds of rows lie at each end.
CLIPPED = ("method.reward_limit=1.1", "method.target_reward=1.1")
KINDS: dict[str, tuple[str, ...]] = {
    "value": CLIPPED,
    "quantile": ("method.condition=quantile",),
    "at_least": ("method.condition=at_least", *CLIPPED),
    "value, weighted": (*CLIPPED, "method.weight_by_reward=true", "method.beta=1"),
}
ENDS = ("highest target", "lowest target")
TRAIN = (
    *("data.max_length=256", "trainer.micro_batch_size=16", "trainer.global_batch_size=32"),
    *("optim.lr=2e-3", "optim.lr_warmup_steps=10"),
)
ANSWER = ("data.max_length=256", "generate.max_new_tokens=48", "generate.batch_size=160")

Means = dict[tuple[str, str], dict[int, float]]
"""Mean true quality by condition and end, then by seed."""


def qualities(demo: Path, runs: Path, kind: str, seed: int) -> list[float]:
    """Train and answer; return the mean true quality for the highest and for the lowest target."""
    folder = runs / kind.replace(", ", "_") / f"seed_{seed}"
    policy, answers = folder / "ca", folder / "generate"
    targets = "[5,1]" if kind == "quantile" else "[1.1,-1.1]"
    rows = [f"data.train={demo / 'label' / 'labelled.jsonl'}", f"data.cache_dir={runs / 'cache'}"]
    _run("ca", f"run.dir={policy}", f"run.seed={seed}", f"init.from={demo / 'sft'}", *rows, *TRAIN, *KINDS[kind])
    asked = [f"data.input={demo / 'prepare' / 'prompts.jsonl'}", f"method.target_reward={targets}"]
    _run("generate", f"run.dir={answers}", f"init.from={policy}", *asked, *ANSWER)
    found = defaultdict[str, list[float]](list)
    for row in map(json.loads, (answers / "generations.jsonl").read_text(encoding="utf-8").splitlines()):
        found[row["condition"]].append(true_quality((Message("user", row["prompt"]),), row["response"]))
    # The answers for the highest target come first.
    return [float(np.mean(each)) for each in found.values()]


def _run(*words: str) -> None:
    if (code := run(list(words))) != 0:
        raise SystemExit(code)


def table(means: Means) -> list[str]:
    """Return the table in Markdown: means over seeds, and differences to `value`, paired by seed."""
    lines = ["| condition | " + " | ".join(f"{end} | against `value`" for end in ENDS) + " |", "|---|---|---|---|---|"]
    for kind in KINDS:
        cells = []
        for end in ENDS:
            own, base = means[kind, end], means["value", end]
            difference = [own[seed] - base[seed] for seed in own]
            cells += [_shown([*own.values()]), "" if kind == "value" else _shown(difference)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def _shown(values: Sequence[float]) -> str:
    found = over_seeds(np.array(values), 0.95)
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main() -> None:
    """Run all conditions and seeds, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("runs"), help="folder of the demo's runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/conditions"), help="folder for the new runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    given = parser.parse_args()
    means: Means = defaultdict(dict)
    for seed in given.seeds:
        for kind in KINDS:
            for end, quality in zip(ENDS, qualities(given.demo, given.runs, kind, seed), strict=True):
                means[kind, end][seed] = quality
    print("\n".join(table(means)))


if __name__ == "__main__":
    main()
