"""Helpers to run the real commands with tiny models in this process."""

import json
from pathlib import Path
from typing import Any

from offline_align.__main__ import run

# A step takes milliseconds, and the sizes are divisible by two ranks.
TINY = [
    "model=demo",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "data.max_length=128",
    "run.device=cpu",
    "debug=true",
]
STEPS = ["trainer.global_batch_size=4", "trainer.max_steps=5", "optim.lr=1e-2"]
WORDS = ("red", "green", "blue", "cat", "dog", "owl", "house", "tree", "river", "stone", "seven", "nine")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def samples(count: int = 14) -> list[dict[str, Any]]:
    """Return rows of different lengths, each with its own text."""
    return [
        {
            "id": f"s{i}",
            "prompt": f"Name {WORDS[i % 12]}",
            "response": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 7]),
        }
        for i in range(count)
    ]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{i}",
            "prompt": f"Say {WORDS[i % 12]}",
            "chosen": f"{WORDS[i % 12]} please",
            "rejected": WORDS[-i % 12] * 2,
        }
        for i in range(count)
    ]


def labelled(rewards: list[float]) -> list[dict[str, Any]]:
    return [
        {**row, "reward_raw": r, "reward": r, "source_id": row["id"]}
        for row, r in zip(samples(len(rewards)), rewards, strict=True)
    ]


def train(stage: str, folder: Path, data: Path, *words: str, model: list[str] | None = None) -> Path:
    """Run a training command to its end and return the run folder."""
    arguments = [
        stage,
        f"run.dir={folder}",
        f"data.train={data}",
        *(TINY if model is None else model),
        *STEPS,
        *words,
    ]
    assert run(arguments) == 0
    return folder


def continued(source: Path) -> list[str]:
    """Return the words for a run that starts from the weights of another run."""
    return [f"init.from={source}", "data.max_length=128", "run.device=cpu", "debug=true"]


def metrics(folder: Path, name: str = "loss") -> list[float]:
    """Return a column of metrics.jsonl, without the lines that lack it."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]
