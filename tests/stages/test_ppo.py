"""The `ppo` command: it learns, keeps its files, ends with the same bits after a kill, and refuses what cannot work."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.lineage import read_manifest
from offline_align.model.description import find_checkpoint
from offline_align.train import checkpoint, saving
from tests.distributed.test_resharding import same
from tests.training import continued, labelled, pairs, samples, train, write_jsonl

TIMES = ("seconds_generate", "seconds_score", "seconds_learn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a policy, a reward model, and labelled rows with their statistics."""
    root = tmp_path_factory.mktemp("ppo")
    base = train("sft", root / "base", write_jsonl(root / "rows.jsonl", samples(40)))
    train("reward", root / "reward", write_jsonl(root / "pairs.jsonl", pairs()), model=continued(base))
    write_jsonl(root / "labelled.jsonl", labelled([0.5, -0.5, 1.0, -1.0, 0.25, 0.75, -0.25, 0.0, 1.5, -1.5]))
    statistics = {"mean": 0.25, "std": 0.5, "count": 10, "quantiles": {"0.5": 0.2}}
    (root / "reward_stats.json").write_text(json.dumps(statistics))
    return root


def words(folder: Path, name: str, *more: str) -> list[str]:
    return [
        "ppo",
        f"run.dir={folder / name}",
        f"init.from={folder / 'base'}",
        f"method.reward_model={folder / 'reward'}",
        f"data.train={folder / 'labelled.jsonl'}",
        "data.max_length=64",
        "run.device=cpu",
        "generate.max_new_tokens=8",
        "method.rollout_batch_size=8",
        "trainer.global_batch_size=4",
        "trainer.max_steps=3",
        "optim.lr=3e-3",
        "method.critic_lr=3e-3",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Return a run that was not interrupted."""
    assert run(words(folder, "whole")) == 0
    return folder / "whole"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def checkpoints(run_dir: Path) -> list[Path]:
    return [find_checkpoint(run_dir), (run_dir / "critic" / "checkpoints" / "latest").resolve()]


def test_the_files_and_metrics_of_a_run(folder: Path, whole: Path) -> None:
    found = metrics(whole)
    assert [row["step"] for row in found] == [1, 2, 3]
    first = found[0]
    # The actor is the reference, and the engine has its weights.
    assert (first["kl"], first["kl_k3"]) == (0, 0)
    for row in found:
        assert row["engine_mismatch_max"] < 1e-5
        assert math.isclose(row["reward"], (row["reward_raw"] - 0.25) / 0.5, abs_tol=1e-6)
    assert found[2]["kl_k3"] > 0
    rows = [json.loads(line) for line in (whole / "rollouts" / "iteration_000002.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {row["iteration"] for row in rows} == {2}
    assert math.isclose(sum(row["reward_raw"] for row in rows) / 8, found[1]["reward_raw"], abs_tol=1e-6)
    assert math.isclose(sum(row["kl"] for row in rows) / 8, found[1]["kl"], abs_tol=1e-6)
    assert sum(row["truncated"] for row in rows) / 8 == found[1]["truncated_share"]
    manifest = read_manifest(whole)
    assert manifest is not None
    assert (manifest.stage, manifest.extra["method"], manifest.extra["iterations"]) == ("ppo", "ppo", 3)
    assert {parent.stage for parent in manifest.parents} == {"sft", "reward"}
    assert manifest.extra["rank_seconds"].keys() >= {"generate", "score", "learn"}
    assert not (whole / "journal").exists()
    assert run(["verify", f"run.dir={whole}"]) == 0
    assert run(words(folder, "whole")) == 0  # it is complete


def test_other_stages_take_the_policy_the_critic_and_the_rollouts(folder: Path, whole: Path) -> None:
    # An untrained policy samples bytes that are no text.
    common = ["data.max_length=64", "run.device=cpu", "data.on_bad_row=skip"]
    asked = ["generate.max_new_tokens=4", f"data.input={folder / 'labelled.jsonl'}"]
    assert run(["generate", f"run.dir={folder / 'answers'}", f"init.from={whole}", *asked, *common]) == 0
    critic = whole / "critic" / "checkpoints" / "latest"
    rollouts = f"data.input={whole / 'rollouts' / 'iteration_000003.jsonl'}"
    assert run(["label", f"run.dir={folder / 'again'}", f"init.from={critic}", rollouts, *common]) == 0
    trained = whole / "rollouts" / "iteration_000003.jsonl"
    train(
        "fa",
        folder / "from_rollouts",
        trained,
        "method.threshold=-99",
        "data.on_bad_row=skip",
        model=continued(folder / "base"),
    )


@pytest.mark.parametrize("phase", ["score", "critic", "actor", "saved"])
def test_a_run_that_breaks_ends_with_the_same_bits(
    folder: Path, whole: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks in the second iteration: before the critic learns, between both, after, or between both saves."""
    from offline_align.online import learner, trainer

    name = f"broken_{phase}"
    settings = words(folder, name, "trainer.save_interval=1")

    with monkeypatch.context() as patch:
        if phase == "score":
            patch.setattr(trainer.PolicyOptimization, "_learn", once_from(2, trainer.PolicyOptimization._learn))
        elif phase == "critic":
            patch.setattr(learner.Learner, "learn", once_from(4, learner.Learner.learn))
        elif phase == "actor":
            patch.setattr(trainer.PolicyOptimization, "_write", once_from(2, trainer.PolicyOptimization._write))
        else:
            patch.setattr(saving.Saver, "save", once_from(4, saving.Saver.save))
        assert run(settings) == 70
    assert run(settings) == 0
    assert metrics(folder / name) == metrics(whole)
    assert all(same(one, other) for one, other in zip(checkpoints(folder / name), checkpoints(whole), strict=True))
    for number in (1, 2, 3):
        file = f"rollouts/iteration_{number:06d}.jsonl"
        assert (folder / name / file).read_bytes() == (whole / file).read_bytes()


def once_from(call: int, method: Any) -> Any:
    """Return `method`, which raises at its call number `call`."""
    calls = [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise ZeroDivisionError
        return method(*arguments, **named)

    return counted


def test_without_a_learning_rate_nothing_changes(folder: Path) -> None:
    still = words(folder, "still", "optim.lr=1e-30", "method.critic_lr=1e-30", "trainer.max_steps=2")
    assert run(still) == 0
    assert [row["kl_k3"] for row in metrics(folder / "still")] == [0, 0]
    for row in metrics(folder / "still"):
        assert (row["clip_fraction"], row["ratio"], row["approximate_kl"]) == (
            0,
            pytest.approx(1, abs=1e-6),
            pytest.approx(0, abs=1e-12),
        )


def test_texts_beside_the_answers_pull_the_policy_towards_them(folder: Path) -> None:
    rows = f"data.ptx={folder / 'rows.jsonl'}"
    assert run(words(folder, "with_texts", rows, "method.ptx_coefficient=5", "trainer.max_steps=4")) == 0
    losses = [row["ptx_loss"] for row in metrics(folder / "with_texts")]
    assert losses[-1] < losses[0]


def test_a_policy_too_far_from_its_start_ends_the_run(folder: Path, capsys: Any) -> None:
    assert run(words(folder, "far", "method.max_kl=1e-9", "trainer.save_interval=1")) == 70
    assert "above method.max_kl=1e-09" in capsys.readouterr().err
    assert checkpoint.newest(folder / "far") is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("method.reward_model=null", "method.reward_model is not set"),
        ("method.reward_model={base}", "is a policy; give a reward model"),
        ("method.critic={base}", "method.critic={base}: is a policy"),
        ("data.valid={rows}", "ppo has no validation"),
        ("generate.temperature=0", "generate.temperature=0"),
        ("method.ptx_coefficient=0.1", "method.ptx_coefficient=0.1, data.ptx=None: give both"),
        ("method.rollout_batch_size=6", "not a multiple of trainer.global_batch_size=4"),
    ],
)
def test_settings_that_cannot_work(folder: Path, changed: str, message: str, capsys: Any) -> None:
    names = {"base": folder / "base", "rows": folder / "rows.jsonl"}
    assert run(words(folder, "refused", changed.format(**names))) == 78
    assert message.format(**names) in capsys.readouterr().err
    assert not (folder / "refused").exists()
