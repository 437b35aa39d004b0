"""Compare training and labelling on the CPU with peers: `python -m benchmarks.cpu --data FOLDER --shape 8m`."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import harness, workload
from benchmarks.harness import Contender

SFT = [
    Contender("offline-align sft, packed", "ours", "sft", arguments=("sft",), ours=True),
    Contender("the same on two ranks", "ours", "sft", arguments=("sft", "launcher.nproc_per_node=2"), ours=True),
    Contender(
        "TRL SFTTrainer, its defaults",
        "peers",
        "trl_sft",
        arguments=("sft", "8", "random", "no", "checkpointing"),
        slow=True,
    ),
    Contender(
        "TRL SFTTrainer, length-grouped",
        "peers",
        "trl_sft",
        arguments=("sft", "8", "group_by_length", "no", "plain"),
        slow=True,
    ),
    Contender("TRL SFTTrainer, one row at a time", "peers", "trl_sft", arguments=("sft", "1", "random", "no", "plain")),
    Contender(
        "TRL SFTTrainer, packing", "peers", "trl_sft", arguments=("sft", "1", "random", "packing", "plain"), slow=True
    ),
    Contender("transformers + DDP, sorted, 4 rows", "peers", "transformers_ddp", arguments=("sft", "4")),
    Contender("transformers + DDP, one row at a time", "peers", "transformers_ddp", arguments=("sft", "1")),
    Contender("transformers + DDP, one row, two ranks", "peers", "transformers_ddp", arguments=("sft", "1", "2")),
    Contender("bare matrix products", "matrices", "training", arguments=("sft",), limit=True),
]
# The SFT loss on both answers to each prompt, the kind of rows that the methods train on.
TOGETHER = [
    Contender(
        "offline-align sft, answers together",
        "ours",
        "sft",
        arguments=("answers", "data.group_by_prompt=true"),
        ours=True,
    ),
    Contender("the same in a random order", "ours", "sft", arguments=("answers",), ours=True),
    Contender(
        "the same, a prompt an answer",
        "ours",
        "sft",
        arguments=("answers", "trainer.share_prompts=false"),
        ours=True,
    ),
    Contender(
        "TRL SFTTrainer, one row at a time", "peers", "trl_sft", arguments=("answers", "1", "random", "no", "plain")
    ),
    Contender("transformers + DDP, one row at a time", "peers", "transformers_ddp", arguments=("answers", "1")),
    Contender("transformers + DDP, one row, two ranks", "peers", "transformers_ddp", arguments=("answers", "1", "2")),
    Contender("bare matrix products", "matrices", "training", arguments=("answers",), limit=True),
]
REWARD = [
    Contender("offline-align reward, packed, prompts once", "ours", "reward", ours=True),
    Contender("the same on two ranks", "ours", "reward", arguments=("launcher.nproc_per_node=2",), ours=True),
    Contender("the same, a prompt an answer", "ours", "reward", arguments=("trainer.share_prompts=false",), ours=True),
    Contender("TRL RewardTrainer, its defaults", "peers", "trl_reward", arguments=("8", "checkpointing"), slow=True),
    Contender("TRL RewardTrainer, no checkpointing", "peers", "trl_reward", arguments=("8", "plain")),
    Contender("TRL RewardTrainer, one pair at a time", "peers", "trl_reward", arguments=("1", "plain")),
    Contender("bare matrix products", "matrices", "pairs", limit=True),
]
DPO = [
    Contender("offline-align dpo, packed, prompts once", "ours", "dpo", ours=True),
    Contender("the same, with its reference passes", "ours", "dpo_and_reference", ours=True),
    Contender("the same, a prompt an answer", "ours", "dpo", arguments=("trainer.share_prompts=false",), ours=True),
    Contender("TRL DPOTrainer, its defaults", "peers", "trl_dpo", arguments=("8", "checkpointing", "model"), slow=True),
    Contender("TRL DPOTrainer, no checkpointing", "peers", "trl_dpo", arguments=("8", "plain", "model")),
    Contender("TRL DPOTrainer, one pair at a time", "peers", "trl_dpo", arguments=("1", "plain", "model")),
    Contender("TRL DPOTrainer, reference before", "peers", "trl_dpo", arguments=("1", "plain", "precomputed")),
    Contender("bare matrix products", "matrices", "preference", limit=True),
]


def _scoring(rows: str) -> list[Contender]:
    peers = {
        "batches of 16 in order": ("16", "in_order"),
        "batches of 16, sorted by length": ("16", "sorted"),
        "batches of 4, sorted by length": ("4", "sorted"),
        "one row at a time": ("1", "sorted"),
    }
    return [
        Contender("offline-align label, packed", "ours", "label", arguments=(rows,), ours=True),
        *(
            Contender(
                f"transformers, {name}", "peers", "batched_scoring", arguments=(rows, *how), slow="in_order" in how
            )
            for name, how in peers.items()
        ),
        Contender("bare matrix products", "matrices", "scoring", arguments=(rows,), limit=True),
    ]


LABEL = [
    *_scoring("sft"),
    Contender("transformers pipeline, batches of 16", "peers", "pipeline_scoring", arguments=("16",), slow=True),
]
# The same rows with rewards. `ca` adds some tokens to every prompt, so the rates count all tokens.
METHODS = [
    Contender("sft", "ours", "method", arguments=("sft",), ours=True),
    Contender("fa", "ours", "method", arguments=("fa", "method.threshold=-100")),
    Contender("rwr", "ours", "method", arguments=("rwr",)),
    Contender("ca", "ours", "method", arguments=("ca",)),
]
TASKS = {
    "methods": (METHODS, "tokens_per_second", "tokens/s"),
    "sft": (SFT, "targets_per_second", "target tokens/s"),
    "together": (TOGETHER, "targets_per_second", "target tokens/s"),
    "reward": (REWARD, "pairs_per_second", "pairs/s"),
    "dpo": (DPO, "pairs_per_second", "pairs/s"),
    "label": (LABEL, "tokens_per_second", "tokens/s"),
    # Two answers to each prompt. offline-align computes the prompt once.
    "answers": (_scoring("answers"), "tokens_per_second", "tokens/s"),
}


def main() -> None:
    """Measure, and write `RESULTS/<task>_<shape>_<precision>.json` and the same as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with *_train.jsonl (SFT and preference rows)")
    parser.add_argument("--shape", choices=sorted(workload.SHAPES), default="8m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32"], help="run in turns")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slow", action="store_true", help="also run peers with settings far from their best")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only contenders whose names contain one of these, and ours"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, scratch = Path(temporary) / "workload", Path(temporary) / "scratch"
        scratch.mkdir()
        shape = workload.SHAPES[options.shape]
        workload.prepare(folder, options.data, shape, options.rows, options.seed)
        if {"label", "answers"} & set(options.task):
            _reward_models(folder)
        folders = {precision: workload.copy_for(precision, folder) for precision in options.precision}
        for task in options.task:
            measure(task, options, folders, scratch)


def _reward_models(folder: Path) -> None:
    """Train a reward model for one step and write it as a run folder and as a Hugging Face folder."""
    from offline_align.__main__ import run

    own = [f"run.dir={folder / 'reward'}", f"init.from={folder / 'model'}", f"data.train={folder / 'pairs.jsonl'}"]
    settings = ["trainer.max_steps=1", "trainer.global_batch_size=4", "data.max_length=2048", "data.template=paper"]
    assert run(["reward", *own, *settings, "run.device=cpu"]) == 0
    out = [f"run.dir={folder / 'reward_hf'}", f"init.from={folder / 'reward'}"]
    assert run(["convert", *out, "convert.to=huggingface", "run.device=cpu"]) == 0


def measure(task: str, options: argparse.Namespace, folders: dict[str, Path], scratch: Path) -> None:
    """Run all contenders of a task in every precision, then print and write the tables and all results."""
    everyone, rate, unit = TASKS[task]
    chosen = [c for c in everyone if c is everyone[0] or any(word in c.name for word in options.only)]
    contenders = [c for c in chosen if options.slow or not c.slow]
    options.results.mkdir(parents=True, exist_ok=True)
    found: dict[str, harness.Found] = {precision: {c.name: [] for c in contenders} for precision in folders}
    for number in range(options.rounds):
        for precision, folder in folders.items():
            title = f"{task}, {precision}, round {number + 1}/{options.rounds}"
            for name, result in harness.one_round(contenders, folder, scratch, title).items():
                found[precision][name].append(result)
    settings = {"task": task, "shape": options.shape, "rows": options.rows, "rounds": options.rounds}
    for precision, results in found.items():
        text = harness.table(contenders, results, rate, unit)
        name = f"{task}_{options.shape}_{precision}"
        (options.results / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{name}\n{text}\n", flush=True)
        middle = harness.medians(results)
        record = {**settings, "precision": precision, "machine": harness.machine(), "medians": middle}
        content = json.dumps(record | {"rounds_of": results}, indent=1)
        (options.results / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    if len(found) > 1:
        # Compare with the best setting of a peer over all precisions.
        together = [replace(c, name=f"{c.name}, {p}") for p in found for c in contenders if not c.limit]
        merged = {f"{name}, {p}": results for p in found for name, results in found[p].items()}
        print("\n".join(harness.verdicts(together, harness.ratios(together, merged, rate))), flush=True)


if __name__ == "__main__":
    main()
