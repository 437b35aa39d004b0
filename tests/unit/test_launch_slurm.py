"""The batch script for a configuration, as text; tests/slurm submits it to a real Slurm."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.launch_slurm import job_environment, job_text, quoted, submit
from offline_align.stages.registry import STAGES
from tests.runs import compose

WORDS = ["run.dir=/data/run", "data.train=/data/rows.jsonl", "launcher=slurm"]


def text_of(*words: str, stage: str = "sft") -> str:
    given = [*WORDS, *words] if stage == "sft" else [*words, "launcher=slurm"]
    composed = compose(stage, given)
    assert composed.problems == []
    return job_text(composed.config, stage, given, on_gpus=not STAGES[stage].one_process)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_launcher_section_becomes_options() -> None:
    words = ["nodes=4", "nproc_per_node=8", "partition=dgx", "account=me", "time=3h50m", "sbatch.exclusive=true"]
    more = ["sbatch.mem-per-gpu=64G", "dependency=12:13", "cpus_per_task=12", "signal_margin_seconds=600"]
    found = options(text_of(*(f"launcher.{word}" for word in [*words, *more])))
    assert found == [
        "--job-name=offline-align-sft",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--partition=dgx",
        "--account=me",
        "--time=3:50:00",
        "--dependency=afterok:12:13",
        "--kill-on-invalid-dep=yes",
        "--output=/data/run/logs/slurm-%j.out",
        "--open-mode=append",
        "--signal=B:USR1@600",
        "--requeue",
        "--exclusive",
        "--mem-per-gpu=64G",
    ]


def test_launcher_options_are_not_passed_to_the_ranks() -> None:
    text = text_of("launcher.nodes=2", "dry_run=true", "optim.lr=1e-5")
    assert "set -- sft run.dir=/data/run data.train=/data/rows.jsonl optim.lr=1e-5\n" in text


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        ([], "1"),
        (["launcher.nproc_per_node=4"], "4"),
        (["launcher.nproc_per_node=4", "run.device=cpu"], None),
        (["launcher.gpus_per_node=0"], None),
        (["launcher.gpus_per_node=8"], "8"),
    ],
)
def test_gpus_are_requested_if_they_are_used(words: list[str], gpus: str | None) -> None:
    asked = [o for o in options(text_of(*words)) if o.startswith("--gpus")]
    assert asked == ([f"--gpus-per-node={gpus}"] if gpus else [])


def test_prepare_requests_no_gpu() -> None:
    text = text_of("run.dir=/data/prepare", "data.input=demo", stage="prepare")
    assert not any(o.startswith("--gpus") for o in options(text))


def test_variables_of_the_launcher_section_are_exported() -> None:
    assert "export NCCL_IB_HCA=mlx5\n" in text_of("launcher.environment.NCCL_IB_HCA=mlx5")
    assert "export A='b $HOME'\n" in text_of("launcher.environment.A='b $HOME'")


def test_a_container_gets_its_own_python() -> None:
    mounts = "launcher.container_mounts=['/data:/data','/home/me:/home/me']"
    text = text_of("launcher.container_image=/images/align.sqsh", mounts)
    (line,) = [line for line in text.splitlines() if line.startswith("container=")]
    words = shlex.split(line.removeprefix("container=(").removesuffix(")"))
    assert words[0] == "--container-image=/images/align.sqsh"
    assert words[2] == "--container-mounts=/data:/data,/home/me:/home/me"
    assert "\npython=python\n" in text


HOSTILE = ["$(touch hit)", "`touch hit`", "a; touch hit", "'; touch hit; '", '"; touch hit; "', "a b#c", "\\"]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_is_never_executed(tmp_path: Path, value: str) -> None:
    """A shell runs the generated head of the script."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    given = [f'run.dir="/x/{escaped}"', f'launcher.account="{escaped}"', f'launcher.environment.A="{escaped}"']
    head = text_of(*given, f'launcher.container_image="{escaped}"').partition("# ---- The same")[0]
    show = 'printf "%s\\n" "$run_dir" "$A" "${container[0]}" "$2"'
    done = subprocess.run(["bash", "-c", head + show], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:3] == [f"/x/{value}", value, f"--container-image={value}"]
    assert list(tmp_path.iterdir()) == []


def test_options_are_quoted_as_slurm_reads_them() -> None:
    assert quoted("--qos=high") == "--qos=high"
    assert quoted("--exclusive") == "--exclusive"
    assert quoted("--comment=it's #1 \"\\") == '--comment="it\'s #1 \\"\\\\"'


def test_a_line_break_cannot_inject_an_option(tmp_path: Path, capsys: Any) -> None:
    words = [f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm"]
    assert run(["prepare", *words, 'launcher.job_name="a\n#SBATCH --uid=0"']) == 78
    assert "launcher.job_name: must not contain line breaks" in capsys.readouterr().err


def test_a_dry_run_prints_the_script_alone_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    words = ["prepare", f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm", "dry_run=true"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=offline-align-prepare\n")
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=False).returncode == 0
    assert not (tmp_path / "out").exists()


def fake(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_job_id_is_printed_and_the_job_not_submitted_twice(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "bin", "sbatch", f"cat > {tmp_path}/job; echo '42;cluster'", monkeypatch)
    fake(tmp_path / "bin", "squeue", '[[ "$*" == *--jobs=42* ]] && echo 42', monkeypatch)
    words = ["prepare", f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm"]
    assert run(words) == 0
    assert capsys.readouterr().out == "42\n"
    assert (tmp_path / "job").read_text().startswith("#!/usr/bin/env bash\n#SBATCH")
    (tmp_path / "job").unlink()
    assert run(words) == 0
    assert capsys.readouterr().out == "42\n"
    assert not (tmp_path / "job").exists()


ALLOCATION = {"SLURM_JOB_ID": "99", "SLURM_CPUS_PER_TASK": "16", "SLURM_MEM_PER_CPU": "4000", "SLURM_CPU_BIND": "none"}
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "61007"}
OTHERS = {"PMI_SIZE": "1", "OMPI_MCA_x": "1", "SLURM_RESTART_COUNT": "2", "OFFLINE_ALIGN_STEP": "99.0"}
USER = {"HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "SLURM_CONF": "/etc/slurm.conf"}


def test_a_job_inherits_nothing_from_the_allocation_that_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fake(tmp_path / "bin", "sbatch", f"cat > /dev/null; env > {tmp_path}/seen; echo 42", monkeypatch)
    theirs = {"SBATCH_JOB_NAME": "outer", "SRUN_CPUS_PER_TASK": "16", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in (ALLOCATION | RANK | OTHERS | theirs | USER).items():
        monkeypatch.setenv(name, value)
    assert run(["prepare", f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm"]) == 0
    assert capsys.readouterr().out == "42\n"
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line)
    assert seen.keys() & (ALLOCATION | RANK | OTHERS | theirs).keys() == set()
    assert USER.items() <= seen.items()


def test_outside_an_allocation_variables_of_sbatch_and_gpus_are_kept() -> None:
    given = {"SBATCH_ACCOUNT": "me", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/home/me"}
    assert job_environment(given | RANK) == given


def test_a_refusal_by_sbatch_is_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1", monkeypatch)
    words = ["prepare", f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm", "launcher.partition=x"]
    assert run(words) == 78
    assert "sbatch refuses the job: sbatch: error: invalid partition" in capsys.readouterr().err


def test_a_missing_sbatch_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match="sbatch is not on PATH"):
        submit("", str(tmp_path / "run"))


def test_prepare_refuses_several_processes(tmp_path: Path, capsys: Any) -> None:
    words = [f"run.dir={tmp_path / 'out'}", "data.input=demo", "launcher=slurm", "launcher.nproc_per_node=2"]
    assert run(["prepare", *words]) == 78
    assert "`prepare` is one process" in capsys.readouterr().err


def test_outputs_of_earlier_jobs_need_not_exist_yet(tmp_path: Path, capsys: Any) -> None:
    words = [f"run.dir={tmp_path / 'out'}", f"data.train={tmp_path / 'none'}", f"init.from={tmp_path / 'no'}"]
    assert run(["fa", *words, "launcher=slurm", "dry_run=true"]) == 78
    assert run(["fa", *words, "launcher=slurm", "dry_run=true", "launcher.dependency=7"]) == 0
    assert run(["fa", *words, "launcher=slurm", "launcher.dependency=7", "method.threshold=nan"]) == 78
