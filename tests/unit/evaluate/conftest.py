"""Fixtures that write generation runs of several methods in the format of `generate`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from offline_align.label.statistics import fit, normalise
from tests.runs import write_manifest

PROMPTS: list[dict[str, Any]] = [
    {"id": "p1", "prompt": "What is the sky?", "benchmark": "vicuna"},
    {"id": "p2", "prompt": [{"role": "user", "content": "Name a river."}], "benchmark": "mt_bench"},
    {"id": "p3", "prompt": "Count to three.", "benchmark": "vicuna"},
]

WriteRun = Callable[..., Path]


def rows_for(answers: Sequence[str], prompts: Sequence[dict[str, Any]] = PROMPTS) -> list[dict[str, Any]]:
    tail = {"finish_reason": "stop", "condition": None}
    return [{**prompt, "response": answer, **tail} for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    def write_run(
        name: str,
        rows: Sequence[dict[str, Any]],
        method: str | None = None,
        target: float | None = None,
    ) -> Path:
        """Write `<name>/generations.jsonl`, and a manifest if `method` is given; return the file."""
        folder = tmp_path / name
        folder.mkdir(parents=True)
        path = folder / "generations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if method is not None:
            condition = None if target is None else {"target_reward": target}
            write_manifest(folder, "generate", name, [], [], [path], {"method": method, "condition": condition})
        return path

    return write_run


WriteChain = Callable[..., Path]


@pytest.fixture
def write_chain(tmp_path: Path) -> WriteChain:
    """Return a function that writes the lineage of a conditional policy and its answers at several targets."""

    def write_chain(
        rewards: Sequence[float],
        answers: dict[float, Sequence[str]],
        stored: float = 1.0,
        condition: dict[str, Any] | None = None,
    ) -> Path:
        """Label rows with raw `rewards` and answer PROMPTS at every target; return the generation file.

        `condition` is what `generate` records of the policy's condition.
        """
        label, policy, generated = (tmp_path / name for name in ("label", "ca", "generate_ca"))
        for folder in (label, policy, generated):
            folder.mkdir()
        labelled = write_label_run(label, rewards)
        (policy / "model.json").write_text("{}")
        extra: dict[str, Any] = {"method": "ca", "condition": {"target_reward": stored}, "seconds": 3600.0, "ranks": 2}
        write_manifest(policy, "ca", "ca", [labelled], [], [policy / "model.json"], extra)
        path = generated / "generations.jsonl"
        rows = [
            {**prompt, "response": text, "finish_reason": "stop", "condition": f"<{target}>"}
            for target, texts in answers.items()
            for prompt, text in zip(PROMPTS, texts, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        extra = {"method": "ca", "targets": {f"<{target}>": target for target in answers}}
        extra |= {} if condition is None else {"stored_condition": condition}
        write_manifest(generated, "generate", "g", [], [policy], [path], extra)
        return path

    return write_chain


def write_label_run(folder: Path, rewards: Sequence[float]) -> Path:
    """Write a finished label run: every third row is an SFT row, the others are answers of pairs."""
    reward_model = folder.parent / "reward"
    checkpoint = reward_model / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.json").write_text("{}")
    write_manifest(reward_model, "reward", "reward", [], [], [checkpoint], {"method": "reward"})
    stats = fit(rewards)
    normal = normalise(rewards, stats).tolist()
    places: tuple[dict[str, str], ...] = ({}, {"answer": "chosen"}, {"answer": "rejected"})
    rows = [
        {"id": f"r{k}", "reward_raw": raw, "reward": reward, **places[k % 3]}
        for k, (raw, reward) in enumerate(zip(rewards, normal, strict=True))
    ]
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward_stats.json").write_text(json.dumps(stats.as_json()))
    outputs = [path, folder / "reward_stats.json"]
    write_manifest(folder, "label", "label", [], [checkpoint], outputs, {"rows": len(rows)})
    return path


class Rounds:
    """Writes the lineage of policies that learn from labelled answers of each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reward = folder / "reward" / "checkpoints" / "step_1"
        self._model(self.reward, "reward", "reward", [], [])

    def _model(self, checkpoint: Path, stage: str, key: str, inputs: list[Path], parents: list[Path]) -> None:
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.json").write_text(json.dumps({"of": key}))
        run_dir = checkpoint.parents[1]
        write_manifest(run_dir, stage, key, inputs, parents, [checkpoint], {"method": stage})

    def first(self, name: str = "sft") -> Path:
        """Write a first policy and return its run folder."""
        self._model(self.folder / name / "checkpoints" / "step_1", "sft", name, [], [])
        return self.folder / name

    def answer(self, policy: Path, name: str, targets: Sequence[float] = (), samples: int = 1) -> Path:
        """Write answers of a policy to PROMPTS, at all targets, and return the file."""
        path = self.folder / name / "generations.jsonl"
        path.parent.mkdir()
        asked: list[str | None] = [f"<{target}>" for target in targets] or [None]
        rows = [
            {**prompt, "response": f"{name} {k}", "finish_reason": "stop", "condition": text, "sample_index": k}
            for text in asked
            for prompt in PROMPTS
            for k in range(samples)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        method = "" if policy.name == "sft" else policy.name.partition("_")[0]
        extra = {"method": method or "sft", "targets": dict(zip(asked, targets, strict=False))}
        write_manifest(path.parent, "generate", name, [], [policy / "checkpoints" / "step_1"], [path], extra)
        return path

    def label(self, answers: Path, name: str, rewards: Sequence[float]) -> Path:
        """Write a label run with these raw rewards and return its rows."""
        folder = self.folder / name
        folder.mkdir()
        stats, path = fit(rewards), folder / "labelled.jsonl"
        path.write_text("{}\n")
        (folder / "reward_stats.json").write_text(json.dumps(stats.as_json()))
        outputs = [path, folder / "reward_stats.json"]
        write_manifest(folder, "label", name, [answers], [self.reward], outputs, {})
        return path

    def learn(self, start: Path, rows: Sequence[Path], name: str) -> Path:
        """Write a policy of the method `name` (before its first `_`) and return its run folder."""
        parents = [start / "checkpoints" / "step_1"]
        checkpoint = self.folder / name / "checkpoints" / "step_1"
        self._model(checkpoint, name.partition("_")[0], name, list(rows), parents)
        return self.folder / name

    def next(self, policy: Path, name: str, rewards: Sequence[float] = (8.0, 10.0, 12.0)) -> Path:
        """Return the policy after one more round."""
        rows = self.label(self.answer(policy, f"answers_{name}"), f"label_{name}", rewards)
        return self.learn(policy, [rows], name)


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return Rounds(tmp_path / "lineage")
