"""The same run at several parallel layouts, with real ranks over gloo: same rows, losses, scores and weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_align.__main__ import run
from offline_align.train.checkpoint import newest
from tests.faults.forks import Forks
from tests.preloaded import python
from tests.training import STEPS, TINY, WORDS, continued, labelled, metrics, pairs, samples, train, write_jsonl
from tests.updates import DECAY_ALONE, decayed_weights, largest_error, read

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "tp2": ["launcher.nproc_per_node=2", "parallel.tensor_model_parallel_size=2"],
    "tp2_sequence": ["launcher.nproc_per_node=2", "parallel=tp2"],
    "dp2": ["launcher.nproc_per_node=2"],
    "dp2_plain_optimizer": ["launcher.nproc_per_node=2", "parallel.use_distributed_optimizer=false"],
    "tp2_dp2": ["launcher.nproc_per_node=4", "parallel=tp2"],
    "cp2": ["launcher.nproc_per_node=2", "parallel.context_parallel_size=2"],
    "cp2_tp2": ["launcher.nproc_per_node=4", "parallel=tp2", "parallel.context_parallel_size=2"],
}


def command(*words: str, really: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, with the rank variables that some containers set.

    With `really`, the command and its ranks are new interpreters.
    """
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "61007"}
    environment = os.environ | place
    return subprocess.run(
        [sys.executable if really else python(), "-m", "offline_align", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """Return the run on one rank that all layouts are compared with."""
    return train("sft", folder / "alone", write_jsonl(folder / "rows.jsonl", samples()))


def weights_of(run: Path) -> dict[str, list[float]]:
    """Return all weights of a run's policy, loaded on one rank."""
    from offline_align.config.sections import ParallelSection, RunSection
    from offline_align.distributed.setup import session
    from offline_align.model.build import build_model
    from offline_align.model.description import ModelDescription, find_checkpoint
    from offline_align.train.checkpoint import load_weights

    checkpoint = find_checkpoint(run)
    description = ModelDescription.load(checkpoint)
    with session(ParallelSection(), RunSection(dir="unused")) as ranks:
        model = build_model(description.kind, description.model, ParallelSection(), ranks.device, bf16=False)
        load_weights(model, checkpoint, ranks)
        return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def forks(folder: Path) -> Iterator[Forks]:
    with Forks(folder) as made:
        yield made


def ranks_of(words: list[str]) -> int:
    return next((int(word.partition("=")[2]) for word in words if word.startswith("launcher.")), 1)


def by_ranks(forks: Forks, *words: str) -> None:
    """Run a command on as many ranks as its launcher options ask for, without the launcher."""
    own = [word for word in words if not word.startswith("launcher.")]
    ended = forks.run(own, world=ranks_of(list(words)))
    assert not any(ended.codes), ended.said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(folder: Path, forks: Forks, alone: Path, layout: str) -> None:
    run = folder / layout
    words = ["sft", f"run.dir={run}", f"data.train={folder / 'rows.jsonl'}", *TINY, *STEPS, *LAYOUTS[layout]]
    if layout == "tp2_dp2":
        done = command(*words)
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in (run / "logs").iterdir()) == [f"rank_{rank:03d}.log" for rank in range(4)]
    else:
        by_ranks(forks, *words)
    assert metrics(run) == pytest.approx(metrics(alone), abs=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)
    assert metrics(run, "consumed_samples") == metrics(alone, "consumed_samples")
    ours, theirs = weights_of(run), weights_of(alone)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, abs=2e-4), name


@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_only_matrices_decay(folder: Path, forks: Forks, alone: Path, optimizer: str) -> None:
    own = folder / f"decay {optimizer}"
    own.mkdir()
    layout = [word for word in LAYOUTS["tp2_dp2"] if not word.startswith("launcher.")]
    words = [*TINY, *STEPS, *DECAY_ALONE, "model.qk_layernorm=true", "model.add_qkv_bias=true", *layout]
    plain = ["parallel.use_distributed_optimizer=false"] * (optimizer == "plain")
    command = ["sft", f"run.dir={own / 'run'}", f"data.train={folder / 'rows.jsonl'}", *words, *plain]
    ended = forks.run(command, world=4, sabotage=("updates_recorded", [str(own)]))
    assert ended.codes == [0] * 4, ended.said
    for rank in range(4):
        done = read(own / f"updates_{rank}")
        assert len(done) == 5
        assert largest_error(done[-1]["after"], decayed_weights(done)) < 1e-4, rank


@pytest.mark.parametrize("layout", ["tp2_sequence", "cp2_tp2"])
def test_training_continues_after_a_validation_with_larger_bins(folder: Path, forks: Forks, layout: str) -> None:
    """Buffers that are reused, such as the one for a gathered sequence, must grow with the larger bins."""
    rows = write_jsonl(folder / "few.jsonl", samples())
    longer = [{**row, "id": f"v{row['id']}", "prompt": f"{row['prompt']} " * 9} for row in samples()]
    valid = write_jsonl(folder / "longer.jsonl", longer)
    more = [f"data.train={rows}", f"data.valid={valid}", "trainer.eval_interval=2", *TINY, *STEPS]
    found = {}
    for name, words in (("one", []), (layout, LAYOUTS[layout])):
        run_dir = folder / f"validated {layout} {name}"
        by_ranks(forks, "sft", f"run.dir={run_dir}", *more, *words)
        found[name] = [*metrics(run_dir), *metrics(run_dir, "valid_loss")]
    assert len(found["one"]) == 5 + 3
    assert found[layout] == pytest.approx(found["one"], abs=1e-5)


def computed_tokens(run: Path) -> float:
    """Return the number of row tokens that the steps of a run computed."""
    return sum(r * s for r, s in zip(metrics(run, "tokens_per_second"), metrics(run, "step_seconds"), strict=True))


def test_reward_model_and_labels_agree_between_layouts(folder: Path, forks: Forks, alone: Path) -> None:
    # The prompts are long enough to be shared by both answers of a pair.
    data = write_jsonl(folder / "pairs.jsonl", [{**row, "prompt": f"{row['prompt']} " * 12} for row in pairs()])
    words = ["trainer.global_batch_size=4", "trainer.max_steps=5", "optim.lr=1e-3", f"data.valid={data}"]
    one = train("reward", folder / "reward", data, *words, model=continued(alone))
    apart = train("reward", folder / "apart", data, *words, "trainer.share_prompts=false", model=continued(alone))
    assert metrics(apart) == pytest.approx(metrics(one), abs=1e-5)
    assert computed_tokens(one) < 0.7 * computed_tokens(apart)
    split = folder / "reward_tp2_dp2"
    by_ranks(forks, "reward", f"run.dir={split}", f"data.train={data}", *continued(alone), *words, *LAYOUTS["tp2_dp2"])
    assert metrics(split) == pytest.approx(metrics(one), abs=1e-5)
    for name in ("valid_accuracy", "valid_ties", "valid_count"):
        assert metrics(split, name) == metrics(one, name)
    assert metrics(one, "valid_count") == [12]
    # The model was trained at TP=2; it labels at TP=1 on one rank and at TP=2 on four ranks.
    both = f"data.input=[{data},{folder / 'rows.jsonl'}]"
    scores = {}
    for name, layout in (("one", []), ("four", LAYOUTS["tp2_dp2"])):
        run = folder / f"label_{name}"
        cpu = ["data.max_length=128", "run.device=cpu"]
        by_ranks(forks, "label", f"run.dir={run}", f"init.from={split}", both, *cpu, *layout)
        rows = [json.loads(line) for line in (run / "labelled.jsonl").read_text().splitlines()]
        scores[name] = {row["id"]: row["reward_raw"] for row in rows}
        assert [row["id"] for row in rows] == [
            *(f"p{i}/{answer}" for i in range(12) for answer in ("chosen", "rejected")),
            *(f"s{i}" for i in range(14)),
        ]
    assert scores["one"] == pytest.approx(scores["four"], abs=1e-5)


@pytest.mark.parametrize("stage", ["rwr", "ca"])
def test_methods_compute_a_prompt_once_for_the_answers_of_a_step(folder: Path, forks: Forks, stage: str) -> None:
    # Three answers to each prompt, which are not adjacent in the file.
    rows = [
        {**row, "prompt": f"Say {WORDS[i % 5]} " * 12} for i, row in enumerate(labelled([i / 3 for i in range(15)]))
    ]
    data = write_jsonl(folder / f"{stage}.jsonl", rows)
    words = ["data.group_by_prompt=true", "trainer.global_batch_size=6", f"data.valid={data}"]
    one = train(stage, folder / f"{stage}_one", data, *words)
    apart = train(stage, folder / f"{stage}_apart", data, *words, "trainer.share_prompts=false")
    assert metrics(apart) == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(apart, "valid_loss") == pytest.approx(metrics(one, "valid_loss"), abs=1e-5)
    assert metrics(apart, "count") == metrics(one, "count")
    assert computed_tokens(one) < 0.6 * computed_tokens(apart)
    split = folder / f"{stage}_split"
    command = [stage, f"run.dir={split}", f"data.train={data}", *TINY, *STEPS, *words, *LAYOUTS["tp2_dp2"]]
    by_ranks(forks, *command)
    assert metrics(split) == pytest.approx(metrics(one), abs=1e-5)
    assert metrics(split, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("layout", ["tp2_dp2", "cp2"])
def test_dpo_agrees_between_layouts(folder: Path, forks: Forks, alone: Path, layout: str) -> None:
    # The prompts are long enough to be shared by both answers of a pair.
    data = write_jsonl(folder / "preferred.jsonl", [{**row, "prompt": f"{row['prompt']} " * 12} for row in pairs()])
    words = ["trainer.global_batch_size=6", "optim.lr=1e-3", "method.sft_coefficient=0.1", f"data.valid={data}"]
    one = folder / "dpo_one"
    if not one.exists():
        train("dpo", one, data, *words, model=continued(alone))
    split = folder / f"dpo_{layout}"
    rows = [f"data.train={data}", *continued(alone)]
    by_ranks(forks, "dpo", f"run.dir={split}", *rows, *STEPS, *words, *LAYOUTS[layout])
    for name in ("loss", "valid_loss", "reward_gap", "chosen_log_likelihood"):
        assert metrics(split, name) == pytest.approx(metrics(one, name), abs=1e-4, rel=1e-5), name
    assert metrics(split, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    assert metrics(split, "count") == metrics(one, "count") == [6] * 5


def test_the_distance_between_policies_agrees_between_layouts(folder: Path, forks: Forks, alone: Path) -> None:
    rows, data = folder / "rows.jsonl", write_jsonl(folder / "preferences.jsonl", pairs())
    reward = train("reward", folder / "judge", data, "optim.lr=1e-3", model=continued(alone))
    moved = train("sft", folder / "moved", rows, "run.seed=7", "optim.lr=3e-3", model=continued(alone))
    cpu = ["data.max_length=128", "run.device=cpu"]
    for name, policy in (("sft", alone), ("moved", moved)):
        words = [f"run.dir={folder / 'answers' / name}", f"init.from={policy}", f"data.input={rows}", *cpu]
        assert run(["generate", *words, "generate.max_new_tokens=12"]) == 0
    files = ",".join(str(folder / "answers" / name / "generations.jsonl") for name in ("sft", "moved"))
    found = {}
    for layout in ("one", "tp2_sequence", "cp2"):
        target = folder / f"evaluate_{layout}"
        words = [f"run.dir={target}", f"judge.model={reward}", f"data.input=[{files}]", "evaluate.bootstrap_samples=20"]
        by_ranks(forks, "evaluate", *words, *cpu, *LAYOUTS.get(layout, []))
        (method,) = json.loads((target / "report.json").read_text())["optimisation"]["methods"].values()
        found[layout] = [method["kl_per_token"], method["kl_prompts"], *method["kl"].values(), *method["gain"].values()]
    assert abs(found["one"][0]) > 1e-3
    for layout in ("tp2_sequence", "cp2"):
        assert found[layout] == pytest.approx(found["one"], abs=1e-5), layout


def test_an_error_of_rank_0_ends_all_ranks_with_its_code_and_one_line(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    done = command(
        "sft",
        f"run.dir={folder / 'bad'}",
        f"data.train={bad}",
        *TINY[:-1],
        *STEPS,
        "launcher.nproc_per_node=2",
        really=True,
    )
    assert done.returncode == 65
    lines = [line for line in done.stderr.splitlines() if "error:" in line and "offline-align" in line]
    assert len(lines) == 1
    assert f"{bad}:2: response" in lines[0]
    assert "Traceback" not in done.stderr


def test_a_bad_layout_is_refused_before_ranks_are_started(folder: Path) -> None:
    done = command(
        "sft",
        f"run.dir={folder / 'never'}",
        f"data.train={folder / 'rows.jsonl'}",
        *TINY,
        "launcher.nproc_per_node=3",
        "parallel.tensor_model_parallel_size=3",
        "trainer.global_batch_size=4",
    )
    assert done.returncode == 78
    assert "parallel.tensor_model_parallel_size=3: does not divide model.num_attention_heads=4" in done.stderr
    assert not (folder / "never").exists()


def test_ranks_of_the_users_torchrun_are_used(folder: Path) -> None:
    """`torchrun -m offline_align` starts the ranks itself, so the launcher section starts none."""
    data = write_jsonl(folder / "labelled.jsonl", labelled([float(i % 3) for i in range(14)]))
    run = folder / "torchrun"
    words = ["rwr", f"run.dir={run}", f"data.train={data}", *TINY, *STEPS, "trainer.max_steps=2"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "offline_align",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["extra"]["ranks"] == 2
    assert 0 < manifest["extra"]["data"]["effective_sample_size"] <= 14


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_launcher_saves_and_exits_75(folder: Path, alone: Path, name: str) -> None:
    """The launcher passes the signal on, and the ranks finish their step and save."""
    run = folder / f"stopped_{name}"
    words = ["sft", f"run.dir={run}", f"data.train={folder / 'rows.jsonl'}", *TINY[:-1], *STEPS, *LAYOUTS["dp2"]]
    words += ["trainer.max_steps=4000", "optim.lr_decay_steps=4000"]
    started = subprocess.Popen([python(), "-m", "offline_align", *words], stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() and started.poll() is None:
        time.sleep(0.2)
    time.sleep(1.0)
    started.send_signal(signal.Signals[name])
    _, messages = started.communicate(timeout=120)
    assert started.returncode == 75, messages
    assert newest(run) is not None
    assert "Traceback" not in messages
    assert messages.count(f"stopped by {name} after step") == 1
