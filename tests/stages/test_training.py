"""Training runs from start to end: files, continuation, early stops and errors."""

import json
import os
import signal
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.train import checkpoint
from offline_align.train.checkpoint import STATE_NAME, newest
from tests.runs import write_manifest
from tests.training import STEPS, TINY, continued, labelled, metrics, pairs, samples, train, write_jsonl


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", samples())


def test_a_run_writes_what_the_next_one_needs(tmp_path: Path, rows: Path) -> None:
    folder = train("sft", tmp_path / "run", rows, f"data.valid={rows}", "trainer.eval_interval=2")
    for name in (
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints/latest/model.json",
    ):
        assert (folder / name).exists()
    assert (folder / "checkpoints" / "latest").resolve().name == "step_00000005"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "consumed_samples", "padding_fraction"}
    assert wanted <= first.keys()
    assert len(metrics(folder, "valid_loss")) == 3
    best = json.loads((folder / "checkpoints" / "best" / STATE_NAME).read_text())
    assert best["best_value"] == pytest.approx(min(metrics(folder, "valid_loss")))
    assert run(["verify", f"run.dir={folder}"]) == 0


def test_a_run_leaves_no_model_and_no_process_group_behind(tmp_path: Path, rows: Path) -> None:
    """Gradient hooks can keep a model alive unseen by the garbage collector, at the cost of later runs."""
    import gc

    from megatron.core.distributed import DistributedDataParallel

    train("sft", tmp_path / "run", rows)
    gc.collect()
    assert [one for one in gc.get_objects() if type(one) is DistributedDataParallel] == []


def test_a_finished_run_is_reported_and_not_repeated(tmp_path: Path, rows: Path) -> None:
    folder = train("sft", tmp_path / "run", rows)
    before = (folder / "manifest.json").stat().st_mtime_ns
    train("sft", folder, rows)
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_other_settings_in_a_finished_folder_are_refused(tmp_path: Path, rows: Path, capsys: Any) -> None:
    folder = train("sft", tmp_path / "run", rows)
    assert run(["sft", f"run.dir={folder}", f"data.train={rows}", *TINY[:-1], *STEPS, "optim.lr=1e-4"]) == 78
    assert "run.dir" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_continued_run_equals_an_uninterrupted_one(tmp_path: Path, stage: str, monkeypatch: Any) -> None:
    """A signal after step 2 gives exit 75, and the same command then ends with bit-identical losses."""
    from offline_align.train import trainer

    data = write_jsonl(tmp_path / "data.jsonl", samples() if stage == "sft" else pairs())
    whole = train(stage, tmp_path / "whole", data, "trainer.global_batch_size=3")
    words = [
        stage,
        f"run.dir={tmp_path / 'cut'}",
        f"data.train={data}",
        *TINY,
        *STEPS,
        "trainer.global_batch_size=3",
    ]
    original = trainer.Trainer._advance

    def kill_after_two(self: trainer.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_advance", kill_after_two)
        assert run(words) == 75
    found = newest(tmp_path / "cut")
    assert found is not None and found.name == "step_00000002"
    assert run(words) == 0
    assert metrics(tmp_path / "cut") == metrics(whole)
    assert metrics(tmp_path / "cut", "grad_norm") == metrics(whole, "grad_norm")


def test_a_continuation_with_other_settings_is_refused(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    assert run([*words, "trainer.max_time=0.001"]) == 75
    assert run([*words, "optim.adam_beta1=0.5", "run.seed=7"]) == 78
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("; restore")[0] for line in said if "error" in line][-2:] == [
        "offline-align: error: optim.adam_beta1=0.5: this run began with 0.9",
        "offline-align: error: run.seed=7: this run began with 1234",
    ]
    assert run(words) == 0


def test_a_continuation_with_other_data_is_refused(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    assert run([*words, "trainer.max_time=0.001"]) == 75
    content = rows.read_text()
    rows.write_text(content.replace("red", "rot"))
    assert run(words) == 78
    assert f"data.train={rows}: has other content than when this run began" in capsys.readouterr().err
    # Another file name with the same content is not a change.
    rows.rename(tmp_path / "moved.jsonl")
    (tmp_path / "moved.jsonl").write_text(content)
    assert run([*words, f"data.train={tmp_path / 'moved.jsonl'}"]) == 0


def test_a_run_continues_longer_and_at_another_learning_rate(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    words += ["optim.lr_decay_style=constant"]
    assert run([*words, "trainer.max_time=0.001"]) == 75
    longer = [*words, "trainer.max_steps=7", "optim.lr=1e-3"]
    assert run(longer) == 0
    assert metrics(tmp_path / "run", "lr") == [1e-2, *[1e-3] * 6]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    changes = {"after_step": 1, "optim.lr": [1e-2, 1e-3], "trainer.max_steps": [5, 7]}
    assert manifest["extra"]["changed_settings"] == [changes]
    before = (tmp_path / "run" / "manifest.json").stat().st_mtime_ns
    assert run(longer) == 0, "the last command finds its run complete"
    assert (tmp_path / "run" / "manifest.json").stat().st_mtime_ns == before
    assert run(words) == 78
    assert run([*longer, f"run.dir={tmp_path / 'straight'}"]) == 0
    straight = json.loads((tmp_path / "straight" / "manifest.json").read_text())
    assert straight["key"] != manifest["key"], "the same settings from the start give something else"
    assert run(["verify", f"run.dir={tmp_path / 'run'}"]) == 0


def test_answers_that_could_share_a_step_are_logged(tmp_path: Path, rows: Path, caplog: Any) -> None:
    again = [{**row, "id": f"{row['id']}b", "response": "again"} for row in samples()]
    twice = write_jsonl(tmp_path / "twice.jsonl", [*samples(), *again])
    for name, data, words, said in (
        ("twice", twice, [], True),
        ("together", twice, ["data.group_by_prompt=true"], False),
        ("apart", twice, ["trainer.share_prompts=false"], False),
        ("once", rows, [], False),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            train("sft", tmp_path / name, data, "trainer.max_steps=1", *words)
        assert any("data.group_by_prompt=true" in line for line in caplog.messages) is said, name


def test_a_run_cannot_become_shorter_than_its_finished_steps(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    words += ["optim.lr_decay_style=constant", "trainer.save_interval=1"]
    from offline_align.train import trainer

    original = trainer.Trainer._advance

    def stop_after_three(self: trainer.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        if self.state.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_advance", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(words)
    assert run([*words, "trainer.max_steps=1"]) == 78
    assert "trainer.max_steps=1: this run has done 2 steps already; give 2 or more" in capsys.readouterr().err
    assert run([*words, "trainer.max_steps=3"]) == 0


def test_overlapped_communication_changes_nothing(tmp_path: Path, rows: Path, monkeypatch: Any) -> None:
    """Overlap needs CUDA streams, but its bookkeeping (hooks, late gathers of weights) runs without them."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from offline_align.train import optim

    words = [f"data.valid={rows}", "trainer.eval_interval=2", "trainer.save_interval=2"]
    plain = train("sft", tmp_path / "plain", rows, *words)
    made = []

    def overlapped(**settings: Any) -> Any:
        # Each weight matrix gets its own bucket, as in a large model, so every gather must be waited for.
        made.append(settings | {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 64})
        return optim_config(**made[-1])

    optim_config = DistributedDataParallelConfig
    monkeypatch.setattr(optim, "DistributedDataParallelConfig", overlapped)
    monkeypatch.setattr(optim, "_overlaps_param_gather", lambda *_: True)
    late = train("sft", tmp_path / "late", rows, *words)
    assert made
    assert metrics(late) == metrics(plain)
    assert metrics(late, "valid_loss") == metrics(plain, "valid_loss")


def test_old_checkpoints_are_deleted_and_the_best_stays(tmp_path: Path, rows: Path) -> None:
    words = [
        "trainer.save_interval=1",
        "trainer.keep_checkpoints=2",
        f"data.valid={rows}",
        "trainer.eval_interval=1",
    ]
    folder = train("sft", tmp_path / "run", rows, *words)
    left = {p.name for p in (folder / "checkpoints").glob("step_*")}
    best = (folder / "checkpoints" / "best").resolve().name
    assert left == {"step_00000004", "step_00000005", best}
    assert not list((folder / "checkpoints").glob(".step_*"))


def validation_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Make the validations of the next training return these losses."""
    from offline_align.train import step, trainer

    evaluate, left = step.evaluate, iter(losses)

    def told(*arguments: Any) -> Any:
        found, count = evaluate(*arguments)
        return found | {"loss": next(left)}, count

    monkeypatch.setattr(trainer, "evaluate", told)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([nan, 3.0, 4.0, inf, 2.0], 5),
        ([nan, -inf, 4.0, 3.5, nan], 4),
        ([3.0, nan, 4.0, 3.0, -inf], 1),
        ([nan, inf, -inf, nan, nan], None),
    ],
)
def test_a_validation_that_is_not_finite_is_never_the_best(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, losses: list[float], best: int | None
) -> None:
    validation_losses(monkeypatch, losses)
    folder = train("sft", tmp_path / "run", rows, f"data.valid={rows}", "trainer.eval_interval=1")
    state = json.loads((folder / "checkpoints" / "latest" / STATE_NAME).read_text())
    value = None if best is None else losses[best - 1]
    assert (state["best_step"], state["best_value"]) == (best, value)
    extra = json.loads((folder / "manifest.json").read_text())["extra"]
    assert (extra["best_step"], extra["best_validation_loss"]) == (best, value)
    link = folder / "checkpoints" / "best"
    assert link.is_symlink() == (best is not None)
    if best is not None:
        assert link.resolve().name == f"step_{best:08d}"
    said = [record.message for record in caplog.records if "cannot be `best`" in record.message]
    assert len(said) == sum(not isfinite(loss) for loss in losses)


def test_a_best_validation_of_an_earlier_version_that_is_not_finite_is_forgotten(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    command = ["sft", f"run.dir={folder}", f"data.train={rows}", *TINY, *STEPS, f"data.valid={rows}"]
    command += ["trainer.eval_interval=1"]
    assert run([*command, "trainer.max_time=0.001"]) == 75
    first = checkpoint.step_folder(folder, 1)
    state = json.loads((first / STATE_NAME).read_text())
    earlier = state | {"validation_due": False, "best_step": 1, "best_value": nan}
    (first / STATE_NAME).write_text(json.dumps(earlier))
    files = json.loads((first / checkpoint.FILES_NAME).read_text())["files"]
    files[STATE_NAME] = checkpoint.entry(first / STATE_NAME)
    (first / checkpoint.FILES_NAME).write_text(checkpoint.manifest_text(files))
    checkpoint.link(first, "best")
    validation_losses(monkeypatch, [nan, 5.0, 4.0, 6.0])
    assert run(command) == 0
    assert (folder / "checkpoints" / "best").resolve().name == "step_00000004"
    assert json.loads((folder / "manifest.json").read_text())["extra"]["best_validation_loss"] == 4.0


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, rows: Path, damage: str, capsys: Any) -> None:
    folder = train("sft", tmp_path / "run", rows)
    shard = next((folder / "checkpoints" / "latest").resolve().glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-100])
    else:
        shard.unlink()
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    words = [w for w in continued(folder) if w != "debug=true"]
    assert run(["reward", f"run.dir={tmp_path / 'next'}", f"data.train={data}", *words, *STEPS]) == 74
    assert shard.name in capsys.readouterr().err


def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    # The initial weights are so large that the gradient overflows fp32.
    assert run([*words, "model.init_method_std=1e30"]) == 70
    assert "3 steps in a row were not finite" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in lines] == [None] * 3
    assert lines[-1]["skipped_steps"] == 3


def test_bad_rows_are_skipped_and_quarantined(tmp_path: Path, rows: Path) -> None:
    text = rows.read_text().splitlines()
    dirty = tmp_path / "dirty.jsonl"
    dirty.write_text("\n".join([*text[:3], '{"prompt": "x"}', "not json", *text[3:]]) + "\n")
    clean, skipped = (
        train("sft", tmp_path / "clean", rows),
        train("sft", tmp_path / "skip", dirty, "data.on_bad_row=skip"),
    )
    assert metrics(skipped) == metrics(clean)
    aside = [json.loads(line) for line in (skipped / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == [4, 5]


def test_a_model_of_the_wrong_kind_is_refused(tmp_path: Path, rows: Path, capsys: Any) -> None:
    policy = train("sft", tmp_path / "policy", rows)
    assert run(["label", f"run.dir={tmp_path / 'x'}", f"init.from={policy}", f"data.input={rows}"]) == 78
    assert "needs a reward model" in capsys.readouterr().err


def test_architecture_comes_with_the_weights(tmp_path: Path, rows: Path, capsys: Any) -> None:
    policy = train("sft", tmp_path / "policy", rows)
    words = [w for w in continued(policy) if w != "debug=true"]
    assert run(["sft", f"run.dir={tmp_path / 'x'}", f"data.train={rows}", *words, "model.num_layers=3"]) == 78
    assert "model.num_layers=3: the weights of init.from" in capsys.readouterr().err


def test_an_unknown_override_is_refused_before_anything_starts(tmp_path: Path, rows: Path, capsys: Any) -> None:
    words = ["sft", f"run.dir={tmp_path / 'run'}", f"data.train={rows}", *TINY[:-1], *STEPS]
    assert run([*words, "model.overrides.fp9=true", "model.overrides.no_rope_freq=2", "optim.lr=0"]) == 78
    said = capsys.readouterr().err
    assert "model.overrides.fp9=True: TransformerConfig has no such field" in said
    assert "model.overrides.no_rope_freq=2: the attention does not support this" in said
    assert not (tmp_path / "run").exists()


def test_all_problems_are_reported_at_once(tmp_path: Path, capsys: Any) -> None:
    words = [
        "model=demo",
        "optim.lr=x",
        "trainer.max_stepz=1",
        "trainer.global_batch_size=3",
        "trainer.micro_batch_size=2",
    ]
    assert run(["sft", f"run.dir={tmp_path}", "data.train=nowhere.jsonl", *words]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("offline-align: error: ") for line in lines)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_bf16_follows_fp32(tmp_path: Path, stage: str) -> None:
    """bf16 has weights and activations in bf16, and main weights, moments and reductions in fp32."""
    data = write_jsonl(tmp_path / "data.jsonl", samples() if stage == "sft" else pairs())
    # With this learning rate, rounding errors do not grow in five steps.
    exact = metrics(train(stage, tmp_path / "fp32", data, "trainer.precision=fp32", "optim.lr=1e-3"))
    rounded = metrics(train(stage, tmp_path / "bf16", data, "trainer.precision=bf16", "optim.lr=1e-3"))
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_a_profile_of_the_requested_steps(tmp_path: Path, rows: Path) -> None:
    folder = train("sft", tmp_path / "run", rows, "trainer.profile_steps=[2,3]")
    trace = json.loads((folder / "profile" / "rank_0_steps_2_3.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_a_validation_file_without_rows_is_no_validation(tmp_path: Path, rows: Path, caplog: Any) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    folder = train("sft", tmp_path / "run", rows, f"data.valid={empty}", "trainer.eval_interval=2")
    assert metrics(folder, "valid_loss") == []
    said = [record.message for record in caplog.records if record.message.startswith("data.valid")]
    assert said == [f"data.valid={empty}: has no rows; the run goes without validation"]
    assert run(["sft", f"run.dir={tmp_path / 'none'}", f"data.train={empty}", *TINY[:-1], *STEPS]) == 65


def test_bad_rows_are_reported_once(tmp_path: Path, caplog: Any) -> None:
    bad: dict[str, Any] = {"prompt": "x"}
    data = write_jsonl(tmp_path / "data.jsonl", [*samples(), bad])
    valid = write_jsonl(tmp_path / "valid.jsonl", samples())
    train("sft", tmp_path / "run", data, f"data.valid={valid}", "data.on_bad_row=skip")
    said = [record.message for record in caplog.records if "left out" in record.message and "bad" in record.message]
    assert len(said) == 1 and said[0].startswith("1 bad row ")


def test_a_labelled_file_that_was_edited_is_refused(tmp_path: Path, capsys: Any) -> None:
    """Otherwise the policy would name the `label` run as its parent, which did not write these rewards."""
    from offline_align.lineage import read_manifest

    folder = tmp_path / "label"
    folder.mkdir()
    path = write_jsonl(folder / "labelled.jsonl", labelled([float(i) for i in range(14)]))
    write_manifest(folder, "label", "k", [], [], [path], {})
    write_jsonl(path, labelled([float(-i) for i in range(14)]))
    words = [*TINY[:-1], *STEPS]
    assert run(["fa", f"run.dir={tmp_path / 'fa'}", f"data.train={path}", *words]) == 65
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"{path}: is not the file that `label` wrote into {folder}" in said
    assert not (tmp_path / "fa" / "checkpoints").exists()
    moved = path.rename(tmp_path / "mine.jsonl")
    assert run(["fa", f"run.dir={tmp_path / 'fa'}", f"data.train={moved}", *words, "method.threshold=-5"]) == 0
    manifest = read_manifest(tmp_path / "fa")
    assert manifest is not None and manifest.parents == []
