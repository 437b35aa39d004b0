"""Test the Dockerfile without a container engine: lint it, and run its RUN steps in virtual environments."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
# Packages of the base image that pip must not change.
BROUGHT = ("torch", "numpy", "triton")
# Packages that only torch needs, which come with it.
WITH_TORCH = ("sympy", "mpmath", "networkx")


def steps(text: str) -> list[str]:
    """Return the commands of the RUN steps without their mount options."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    runs = [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]
    return [re.sub(r"^(--mount=\S+\s+)*", "", run) for run in runs]


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run([str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_versions_are_pinned_and_the_user_is_not_root() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    bases = re.findall(r"^(?:ARG BASE=|FROM )(?!\$)(\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(re.fullmatch(r"\S+:\d\S+", base) for base in bases), bases
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001"]
    installed = re.findall(r"(?<=--no-cache-dir )(\w[^&|]*?)(?= &&)", steps(text)[0])
    assert installed and all("==" in word for word in installed[0].split())


def environment(folder: Path, name: str) -> dict[str, str]:
    """Make an environment that has only pip, and return the variables that activate it."""
    venv.create(folder / name, with_pip=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{folder / name / 'bin'}:/usr/bin:/bin", "VIRTUAL_ENV": str(folder / name)}


def shell(command: str, folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def bring(site: Path) -> None:
    """Link the packages of the base image into an environment, from the environment of the tests."""
    ours = Path(sysconfig.get_paths()["purelib"])
    for name in (*BROUGHT, *WITH_TORCH):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", ".") and not (site / top).exists():
                (site / top).symlink_to(ours / top)
    for extra in ours.glob("nvidia*"):
        if not (site / extra.name).exists():
            (site / extra.name).symlink_to(extra)


@pytest.mark.skipif("TEST_CONTAINER" not in os.environ, reason="downloads packages: run make test-container")
def test_the_steps_run_and_leave_torch_as_it_is(tmp_path: Path) -> None:
    wheel_step, install_step, user_step = steps(DOCKERFILE.read_text(encoding="utf-8"))
    assert "useradd" in user_step  # not run, because it changes the system's users
    source = tmp_path / "source"
    kept = ("offline_align", "configs", "scripts")
    for name in (*kept, "pyproject.toml", "uv.lock", "README.md", "LICENSE"):
        copy = shutil.copytree if name in kept else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPOSITORY / name, source / name)

    def here(command: str) -> str:
        return command.replace("/wheel", str(tmp_path / "wheel")).replace("/tmp/before", str(tmp_path / "before"))

    shell(here(wheel_step), source, environment(tmp_path, "build"))
    image = environment(tmp_path, "image")
    site = next((tmp_path / "image").glob("lib/python3.*/site-packages"))
    bring(site)
    before = shell("python -m pip freeze", tmp_path, image)
    shell(here(install_step), tmp_path, image)
    after = shell("python -m pip freeze", tmp_path, image)
    for name in BROUGHT:
        assert re.findall(rf"^{name}\b.*$", before, re.MULTILINE) == re.findall(rf"^{name}\b.*$", after, re.MULTILINE)
    assert (site / "torch").is_symlink()
    words = f"run.dir={tmp_path / 'run'} data.input=demo prepare.demo_sft_rows=20 prepare.demo_preference_rows=20"
    assert "sft_train.jsonl" in shell(f"offline-align prepare {words}", tmp_path, image)
    job = shell(f"offline-align prepare {words} launcher=slurm dry_run=true", tmp_path, image)
    assert "The same for every job" in job
    assert "offline-align" in shell("python -c 'import torch, megatron.core' && offline-align --help", tmp_path, image)
