"""The installed wheel works without the checkout and composes its own configurations."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def call(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command whose environment does not contain the paths of this checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env=environment)


def build_wheel(folder: Path) -> Path:
    # Build without isolation, so that nothing is downloaded.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    done = call(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, REPOSITORY, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which finds the dependencies in this environment."""
    root = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(root)
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    done = call(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=root)
    assert done.returncode == 0, done.stderr
    [site_packages] = (root / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_installed_package_is_the_one_that_runs(bin_dir: Path, tmp_path: Path) -> None:
    code = "from offline_align.config import compose; print(compose.__file__, compose.configs_dir())"
    done = call(bin_dir / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    module, configs = map(Path, done.stdout.split())
    assert module.is_relative_to(bin_dir.parent)
    assert configs.is_relative_to(bin_dir.parent)
    assert (configs / "stage" / "sft.yaml").is_file()


def test_the_wheel_contains_every_group_of_the_checkout(bin_dir: Path) -> None:
    [carried] = bin_dir.parent.glob("lib/python*/site-packages/offline_align/configs")
    here = REPOSITORY / "configs"
    expected = sorted(p.relative_to(here) for p in here.rglob("*.yaml"))
    assert sorted(p.relative_to(carried) for p in carried.rglob("*.yaml")) == expected


def test_a_dry_run_from_another_folder(bin_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "Say hello.", "response": "Hello."}\n')
    words = ["sft", "model=demo", "data.train=x.jsonl", "run.dir=out", "dry_run=true"]
    done = call(bin_dir / "offline-align", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not (tmp_path / "out").exists()
