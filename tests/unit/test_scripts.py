"""The shell scripts: shellcheck, the chain of jobs, and the batch script's reaction to each exit code.

The batch script runs here with stand-ins for Slurm's commands. In tests/slurm it runs on a real Slurm.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.preloaded import scripts
from tests.support import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
STAGE = SCRIPTS / "slurm" / "stage.sbatch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", ["pipeline.sh", "study.sh", "slurm/pipeline.sh", "slurm/study.sh"])
def test_scripts_print_their_own_help(name: str) -> None:
    asked = subprocess.run(["bash", SCRIPTS / name, "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0
    first = (SCRIPTS / name).read_text().splitlines()[1].removeprefix("# ")
    assert asked.stdout.splitlines()[0] == first


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck here")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*sorted(SCRIPTS.rglob("*.sh")), STAGE]
    assert len(scripts) > 4
    done = subprocess.run(
        [str(SHELLCHECK), "--external-sources", *map(str, scripts)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "first"), [("pipeline", "Run the whole pipeline"), ("rounds", "Align a policy in rounds")]
)
def test_arguments_of_a_script_start_nothing(tmp_path: Path, name: str, first: str) -> None:
    script = SCRIPTS / f"{name}.sh"
    asked, wrong = (
        subprocess.run(["bash", script, word], cwd=tmp_path, capture_output=True, text=True, check=False)
        for word in ("--help", "RUNS=x")
    )
    assert (asked.returncode, wrong.returncode) == (0, 78)
    assert asked.stdout.startswith(first) and "GENERATE_OPTIONS" in asked.stdout
    assert wrong.stderr == f"{name}.sh: takes no argument: RUNS=x\n"
    assert not list(tmp_path.iterdir())


# Prints the words of each command instead of running it; the script inherits the function.
STAND_IN = "offline-align() { printf '%s\\n' \"$*\"; }; export -f offline-align; "


def rounds(folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": os.environ["PATH"], "POLICY": "sft", "REWARD": "reward", "PROMPTS": "held.jsonl", **more}
    script = f"{STAND_IN} {SCRIPTS / 'rounds.sh'}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("method", ["dpo", "fa", "ca"])
def test_each_round_starts_from_the_policy_before_and_keeps_the_first_scale(tmp_path: Path, method: str) -> None:
    done = rounds(
        tmp_path, METHOD=method, RUNS="r", ROUNDS="3", SEED="5", TRAIN_PROMPTS="rows.jsonl", OPTIONS="debug=true"
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        stage, *words = line.split()
        assert "debug=true" in words
        values = dict(word.split("=", 1) for word in words)
        found[values["run.dir"]] = {"stage": stage} | values
    policies = ["sft", f"r/{method}_1", f"r/{method}_2", f"r/{method}_3"]
    for k, policy in enumerate(policies):
        assert found[f"r/round_{k}"]["init.from"] == policy
        assert (found[f"r/round_{k}"]["data.input"], found[f"r/round_{k}"]["run.seed"]) == ("held.jsonl", "5")
    for k, (before, policy) in enumerate(pairwise(policies)):
        answers, label, learned = found[f"r/answers_{k}"], found[f"r/label_{k}"], found[policy]
        assert (answers["init.from"], answers["data.input"]) == (before, "rows.jsonl")
        assert (label["init.from"], label["data.input"]) == ("reward", f"r/answers_{k}/generations.jsonl")
        assert label.get("label.statistics") == (None if k == 0 else "r/label_0")
        assert (learned["stage"], learned["init.from"]) == (method, before)
        assert learned["data.train"] == f"r/label_{k}/labelled.jsonl"
        assert answers["run.seed"] == learned["run.seed"] == str(5 + k)
        report = found[f"r/evaluate_{k + 1}"]
        assert report["data.input"] == f"[{','.join(f'r/round_{n}/generations.jsonl' for n in range(k + 2))}]"


def test_rounds_take_the_next_prompts_and_start_again(tmp_path: Path) -> None:
    lines = [f'{{"id": "{k}"}}' for k in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))  # the last line may lack its end
    done = rounds(tmp_path, RUNS="r", ROUNDS="3", PROMPTS_PER_ROUND="3", TRAIN_PROMPTS="rows.jsonl")
    assert done.returncode == 0, done.stderr
    taken = [(tmp_path / "r" / f"prompts_{k}.jsonl").read_text().splitlines() for k in range(3)]
    assert taken == [lines[:3], [lines[0], *lines[3:]], lines[1:4]]
    assert "data.input=r/prompts_2.jsonl" in done.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"METHOD": "ppo"}, "rounds.sh: METHOD=ppo: use dpo, fa or ca"),
        ({"ROUNDS": "two"}, "rounds.sh: ROUNDS=two: must be a whole number"),
        ({"MAX_KL": "much"}, "rounds.sh: MAX_KL=much: must be a number"),
        ({"PROMPTS": ""}, "rounds.sh: no runs/prepare/prompts.jsonl: run scripts/pipeline.sh first, or set PROMPTS"),
    ],
)
def test_wrong_settings_of_rounds_start_nothing(tmp_path: Path, more: dict[str, str], said: str) -> None:
    done = rounds(tmp_path, **more)
    assert (done.returncode, done.stdout, done.stderr) == (78, "", f"{said}\n")
    assert not list(tmp_path.iterdir())


def test_missing_prompts_of_rounds_are_named(tmp_path: Path) -> None:
    done = rounds(tmp_path, PROMPTS_PER_ROUND="3", TRAIN_PROMPTS="nowhere.jsonl")
    assert done.returncode == 78
    assert done.stderr == "rounds.sh: TRAIN_PROMPTS=nowhere.jsonl: no such file\n"


def test_jobs_depend_on_the_jobs_whose_folders_they_read(tmp_path: Path) -> None:
    """Each stage has its own layout, and the methods wait for the same jobs."""
    environment = {
        "PATH": os.environ["PATH"],
        "RUNS": "/nowhere/runs",
        "TRAIN_OPTIONS": "parallel=tp4 launcher.nodes=4 launcher.nproc_per_node=8",
        "RWR_OPTIONS": "trainer.log_interval=2",
        "LABEL_OPTIONS": "launcher.nodes=2 launcher.nproc_per_node=8",
        "MODEL": "llama3_8b",
        "DATA": "demo",
    }
    done = subprocess.run(
        [str(scripts(tmp_path) / "slurm" / "pipeline.sh"), "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    graph = {line.split()[1]: re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()}
    after = {name: line[-1].removeprefix("after ").split(", ") for name, line in graph.items() if "after " in line[-1]}
    assert after == {
        "sft": ["prepare"],
        "reward": ["prepare", "sft"],
        "label": ["prepare", "reward"],
        "fa": ["sft", "label"],
        "rwr": ["sft", "label"],
        "ca": ["sft", "label"],
        "generate_sft": ["prepare", "sft"],
        "generate_fa": ["prepare", "fa"],
        "generate_rwr": ["prepare", "rwr"],
        "generate_ca": ["prepare", "ca"],
        "evaluate": ["reward", "generate_sft", "generate_fa", "generate_rwr", "generate_ca"],
    }
    assert "4 x 8 ranks, TP 4" in graph["rwr"]
    assert "2 x 8 ranks, TP 1" in graph["label"]


def test_every_training_of_the_study_is_a_job(tmp_path: Path) -> None:
    """Methods and seeds wait for the labels alone, and the page for all answers and judges."""
    environment = {
        "PATH": os.environ["PATH"],
        "RUNS": "/nowhere/study",
        "MODEL": "llama3_8b",
        "DATA": "demo",
        "METHODS": "ca dpo",
        "SEEDS": "2",
        "BEST_OF": "2",
        "LOW_REWARD": "-1.5",
    }
    study = scripts(tmp_path) / "slurm" / "study.sh"
    done = subprocess.run([study, "--dry-run"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = {
        name: set(line.partition(" after ")[2].split(", "))
        for line in done.stdout.splitlines()
        for name in [line.split()[1]]
    }
    assert after["policies/ca_2"] == after["policies/dpo_2"] == {"sft", "label"}
    assert after["answers/ca_2"] == {"prepare", "policies/ca_2"}
    assert after["best_of_n"] == {"reward", "sampled"}
    files = {"start", "best_of_n", "answers/ca_2", "answers/dpo_2"}
    assert after["judge_1"] == {"reward_2", *files}
    assert after["evaluate"] == {"reward", "judge_1", *files}
    wrong = subprocess.run([study, "--dry"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (78, "study.sh: --dry: use --dry-run or --wait\n")


class Job:
    """The batch script of one run folder, with stand-ins for Slurm. Each rank runs `stage`."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder = folder
        self.run = folder / "run"
        self._command("srun", 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"')
        self._command("scontrol", f'[[ "$1" == show ]] && echo n1 || echo "$*" >> {folder}/requeued')
        self._command("squeue", 'echo "${STATE:-RUNNING}"')
        self._command("scancel", "exit 0")
        self._command("python", f"{stage}")

    def _command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)

    def start(self, restarts: int = 0, **more: str) -> "subprocess.Popen[str]":
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "SLURM_RESTART_COUNT": str(restarts),
            **more,
        }
        words = ["bash", str(STAGE), "sft", f"run.dir={self.run}"]
        return subprocess.Popen(
            words,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def attempt(self, restarts: int = 0, **more: str) -> tuple[int, str]:
        """Run one attempt and return its exit code and console output."""
        process = self.start(restarts, **more)
        shown, _ = process.communicate(timeout=60)
        return process.returncode, shown

    @property
    def requeues(self) -> int:
        path = self.folder / "requeued"
        return path.read_text().count("requeue 7") if path.is_file() else 0


RECORD = """echo '{"message": {"message": "%s", "extraInfo": {}, "errorCode": %d}}' > "$TORCHELASTIC_ERROR_FILE" """


def test_a_finished_stage_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "echo working; echo $RANK of $WORLD_SIZE")
    code, shown = job.attempt()
    assert (code, job.requeues) == (0, 0)
    assert "working\n0 of 1\n" in shown and "done" in shown
    assert (job.run / "logs" / "rank_000.log").exists()


@pytest.mark.parametrize(("code", "requeues"), [(75, 1), (70, 1), (74, 1), (137, 1), (1, 1), (65, 0), (78, 0)])
def test_which_exit_codes_are_requeued(tmp_path: Path, code: int, requeues: int) -> None:
    job = Job(tmp_path, f"exit {code}")
    assert job.attempt()[0] == code
    assert job.requeues == requeues


@pytest.mark.parametrize("highest", [75, 143, 137])
def test_the_rank_that_failed_first_decides(tmp_path: Path, highest: int) -> None:
    """srun returns the highest code, which is that of ranks stopped because another had bad data."""
    job = Job(tmp_path, RECORD % ("rows.jsonl:3: response: missing", 65) + f"; exit {highest}")
    code, shown = job.attempt()
    assert (code, job.requeues) == (65, 0)
    assert "first error, rank 0 on n1: rows.jsonl:3: response: missing" in shown


def test_a_killed_rank_is_a_crash_however_the_others_ended(tmp_path: Path) -> None:
    job = Job(tmp_path, RECORD % ("stopped by SIGTERM", 75) + "; exit 137")
    code, shown = job.attempt()
    assert (code, job.requeues) == (137, 1)
    assert "failed with exit code 137" in shown


def test_three_crashes_without_progress_end_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 70")
    shown = [job.attempt(restarts) for restarts in range(3)]
    assert [code for code, _ in shown] == [70, 70, 70]
    assert job.requeues == 2
    assert "giving up: 3 attempts in a row saved nothing new" in shown[2][1]
    # A job that is submitted anew counts anew.
    job.attempt(0)
    assert job.requeues == 3


@pytest.mark.parametrize(
    "progress",
    [
        'mkdir -p "$run/checkpoints/step_0000000$SLURM_RESTART_COUNT"',
        'mkdir -p "$run/journal/abc" && echo line >> "$run/journal/abc/part_00000.jsonl"',
        'echo verdict >> "$run/verdicts.jsonl"',
    ],
)
def test_crashes_with_progress_are_requeued(tmp_path: Path, progress: str) -> None:
    job = Job(tmp_path, f"run={tmp_path / 'run'}; {progress}; exit 70")
    for restarts in range(5):
        job.attempt(restarts)
    assert job.requeues == 5


def test_attempts_ended_by_slurm_count_too(tmp_path: Path) -> None:
    """A node failure also kills the batch script, which then prints no last line."""
    job = Job(tmp_path, "echo working; sleep 60")
    for restarts in range(3):
        process = job.start(restarts)
        assert process.stdout is not None
        while "working" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    code, shown = job.attempt(3)
    assert (code, job.requeues) == (70, 0)
    assert "giving up: 3 attempts in a row saved nothing new" in shown


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_the_job_is_requeued(tmp_path: Path, number: signal.Signals) -> None:
    job = Job(tmp_path, "trap 'echo saved; exit 75' USR1; echo ready; for i in {1..300}; do sleep 0.1; done")
    process = job.start()
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert (process.returncode, job.requeues) == (75, 1), shown
    assert f"{number.name}: the ranks save and stop" in shown and "saved" in shown


def test_a_job_ended_by_slurm_is_not_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 75")
    code, shown = job.attempt(STATE="COMPLETING")
    assert (code, job.requeues) == (75, 0)
    assert "not requeued: Slurm is ending this job (COMPLETING)" in shown


def test_requeue_can_be_left_to_the_user(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 75")
    assert job.attempt(REQUEUE="false")[0] == 75
    assert job.requeues == 0


def test_without_a_run_folder_nothing_starts(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(STAGE), "sft"], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "run.dir" in done.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_torchrun_gets_the_arguments(tmp_path: Path, script: str) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$*"\n')
    torchrun.chmod(0o755)
    words = ["sft", "parallel=tp4", "init.from=/a folder"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NNODES": "2", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "8"}
    done = subprocess.run(
        ["bash", str(SCRIPTS / "torchrun" / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith(f"-m offline_align {' '.join(words)}")
