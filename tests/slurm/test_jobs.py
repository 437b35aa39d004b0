"""A stage as one Slurm job, against a real Slurm: limits, signals, preemption, dead nodes, mistakes, crashes."""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.support import REPOSITORY
from tests.training import TINY, metrics, samples, write_jsonl

STEPS = 100
TRAINING = [
    *(word for word in TINY if word != "debug=true"),
    "trainer.global_batch_size=16",
    "trainer.save_interval=20",
    "optim.lr=1e-3",
    # The same learning rates, whatever the number of steps.
    "optim.lr_decay_steps=5000",
]
TWO_NODES = ["launcher=slurm", "launcher.nodes=2", "parallel=tp2", "launcher.check=false"]


@pytest.fixture(scope="session")
def rows(cluster: Cluster) -> Path:
    return write_jsonl(cluster.folder / "rows.jsonl", samples(48))


def offline_align(cluster: Cluster, *words: str, check: bool = True) -> str:
    return cluster.run(sys.executable, "-m", "offline_align", *words, check=check)


def submit(cluster: Cluster, run: Path, rows: Path, *words: str, steps: int = STEPS) -> str:
    """Submit the training run that each test interrupts in its own way, and return the job id."""
    own = [f"run.dir={run}", f"data.train={rows}", f"trainer.max_steps={steps}"]
    job = offline_align(cluster, "sft", *own, *TRAINING, *TWO_NODES, *words)
    assert re.fullmatch(r"\d+", job), job
    return job


def console(run: Path) -> str:
    """Return the console output of all jobs of a run folder."""
    return "".join(path.read_text() for path in sorted((run / "logs").glob("slurm-*.out")))


def until(what: Callable[[], bool], cluster: Cluster, job: str, seconds: float = 600) -> None:
    """Wait for a condition that a running or requeued job will fulfil."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, cluster.job(job)
        assert cluster.state(job) not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), cluster.job(job)
        cluster.start_now(job)
        time.sleep(0.5)


def steps_done(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").is_file() else 0


def is_undisturbed(run: Path, undisturbed: Path) -> bool:
    """Return whether the metrics of every step are bitwise equal to those of the undisturbed run."""
    assert metrics(run, "step") == list(range(1, len(metrics(undisturbed)) + 1))
    return all(metrics(run, name) == metrics(undisturbed, name) for name in ("loss", "grad_norm", "lr"))


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, rows: Path) -> Path:
    run = cluster.folder / "undisturbed"
    job = cluster.wait(submit(cluster, run, rows, "launcher.check=true"))
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), console(run)
    return run


def test_two_nodes_share_each_layer(cluster: Cluster, undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["extra"]["ranks"] == 2
    assert set(metrics(undisturbed, "slowest_host")) <= {"n1", "n2"}
    shown = console(undisturbed)
    assert "nodes: 1 host, 2 ranks, 0 GPUs, one all-reduce: all good" in shown
    assert "training: " in shown and "sft: done after" in shown
    ranks = [(undisturbed / "logs" / f"rank_00{rank}.log").read_text() for rank in (0, 1)]
    assert "sft: done after" in ranks[0] and "sft: done after" not in ranks[1]


def test_a_complete_run_is_not_submitted_again(cluster: Cluster, undisturbed: Path, rows: Path) -> None:
    words = [f"run.dir={undisturbed}", f"data.train={rows}", f"trainer.max_steps={STEPS}", *TRAINING, *TWO_NODES]
    assert offline_align(cluster, "sft", *words) == ""


def test_three_time_limits_change_nothing(cluster: Cluster, undisturbed: Path, rows: Path) -> None:
    """An attempt of two minutes spends some fifty seconds on steps; the run is too long for three attempts."""
    steps = round(3.5 * 50 / statistics.median(metrics(undisturbed, "step_seconds")))
    partner, run = cluster.folder / "no_limit", cluster.folder / "limits"
    other = submit(cluster, partner, rows, steps=steps)
    limits = ["launcher.time=2m", "launcher.signal_margin_seconds=20", "launcher.attempts=9"]
    job = submit(cluster, run, rows, *limits, steps=steps)
    # Count the lines of rank 0 only; the batch script may repeat them as the first error.
    stopped = "offline-align[rank 0]: stopped by SIGUSR1 after step"
    until(lambda: console(run).count(stopped) == 3, cluster, job, 1200)
    until(lambda: cluster.state(job) == "PENDING", cluster, job)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    end = cluster.wait(job, 1800)
    assert end["JobState"] == "COMPLETED" and int(end["Restarts"]) >= 3, console(run)
    assert cluster.wait(other, 1800)["Restarts"] == "0"
    assert is_undisturbed(run, partner)
    print(f"\n{steps} steps, {end['Restarts']} restarts, the same curve")


def test_scancel_with_sigterm_saves_and_continues(cluster: Cluster, undisturbed: Path, rows: Path) -> None:
    run = cluster.folder / "sigterm"
    job = submit(cluster, run, rows)
    until(lambda: steps_done(run) > 10, cluster, job)
    cluster.run("scancel", "--signal=TERM", job)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), console(run)
    assert "stopped by SIGTERM after step" in console(run)
    assert is_undisturbed(run, undisturbed)


def test_a_preempted_job_saves_and_continues(cluster: Cluster, undisturbed: Path, rows: Path) -> None:
    run = cluster.folder / "preempted"
    job = submit(cluster, run, rows)
    until(lambda: steps_done(run) > 10, cluster, job)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    first = cluster.run("sbatch", "--parsable", *urgent)
    assert cluster.wait(first)["JobState"] == "COMPLETED"
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), console(run)
    assert "stopped by SIGTERM after step" in console(run)
    assert is_undisturbed(run, undisturbed)


def test_a_plain_scancel_ends_the_job(cluster: Cluster, rows: Path) -> None:
    run = cluster.folder / "cancelled"
    job = submit(cluster, run, rows)
    until(lambda: steps_done(run) > 5, cluster, job)
    cluster.run("scancel", job)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), console(run)


def test_a_dead_node_costs_only_the_steps_since_the_last_save(
    cluster: Cluster, undisturbed: Path, rows: Path, node: str = "n2"
) -> None:
    run = cluster.folder / f"dead_{node}"
    job = submit(cluster, run, rows)
    until(lambda: steps_done(run) > 50, cluster, job)
    cluster.kill_node(node)
    until(lambda: cluster.state(job) == "PENDING", cluster, job)
    cluster.start_node(node)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), console(run)
    assert re.search(r"continuing after step [1-9]\d*0 of", console(run))
    assert is_undisturbed(run, undisturbed)


def test_a_bad_key_is_refused_before_submission(cluster: Cluster, rows: Path) -> None:
    run = cluster.folder / "bad_key"
    words = [f"run.dir={run}", f"data.train={rows}", *TRAINING, *TWO_NODES, "optim.lrr=1"]
    assert offline_align(cluster, "sft", *words, check=False) == ""
    assert not run.exists()


@pytest.mark.parametrize(("mistake", "code"), [("optim.lrr=1", 78), ("data.train=BAD", 65)])
def test_a_job_that_would_fail_again_is_not_requeued(cluster: Cluster, rows: Path, mistake: str, code: int) -> None:
    """The script is submitted by hand, so no command checks the settings before submission."""
    run = cluster.folder / f"code_{code}"
    bad = write_jsonl(cluster.folder / "bad.jsonl", [{"prompt": "no answer"}])
    words = [f"run.dir={run}", f"data.train={rows}", *TRAINING, "parallel=tp2", mistake.replace("BAD", str(bad))]
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={cluster.folder}/code_{code}.out"]
    script = str(REPOSITORY / "scripts" / "slurm" / "stage.sbatch")
    by_hand = {"PYTHON": sys.executable, "CHECK_NODES": "false"}
    job = cluster.run("sbatch", "--parsable", *options, script, "sft", *words, more=by_hand)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", f"{code}:0")
    shown = (cluster.folder / f"code_{code}.out").read_text()
    assert f"exit code {code}: another attempt would fail in the same way; not requeued" in shown
    assert "first error, rank" in shown


def test_a_job_gives_up_after_three_crashes_without_progress(cluster: Cluster, rows: Path) -> None:
    run = cluster.folder / "crash"
    crashing = cluster.folder / "crashing python"
    crashing.write_text("#!/bin/sh\nkill -KILL $$\n")
    crashing.chmod(0o755)
    job = submit(cluster, run, rows, f"launcher.python='{crashing}'")
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "2"), console(run)
    assert console(run).count(": requeued") == 2
    assert "giving up: 3 attempts in a row saved nothing new" in console(run)


def test_ranks_that_hang_are_killed_in_time_for_a_requeue(cluster: Cluster, rows: Path) -> None:
    run = cluster.folder / "hang"
    hanging = cluster.folder / "hanging_python"
    hanging.write_text("#!/bin/bash\ntrap '' USR1 TERM\necho hangs\nwhile :; do sleep 1; done\n")
    hanging.chmod(0o755)
    job = submit(cluster, run, rows, f"launcher.python={hanging}", "launcher.signal_margin_seconds=45")
    until(lambda: "hangs" in console(run), cluster, job)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    until(lambda: ": requeued" in console(run), cluster, job)
    assert "failed with exit code 137" in console(run)
    cluster.run("scancel", job)


def test_names_with_special_characters_of_the_shell(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "a b" / "50% of 'it' $HOME"
    name = "one \\\\ \"two\" 'three' #4"
    words = [f'run.dir="{run}"', "data.input=demo", "prepare.demo_sft_rows=20", "prepare.demo_preference_rows=20"]
    job = offline_align(
        cluster, "prepare", *words, "launcher=slurm", 'launcher.job_name="' + name.replace('"', '\\"') + '"'
    )
    end = cluster.wait(job)
    assert end["JobState"] == "COMPLETED", console(run)
    assert (run / "sft_train.jsonl").is_file()
    shown = cluster.run("scontrol", "show", "job", job)
    assert name in shown
