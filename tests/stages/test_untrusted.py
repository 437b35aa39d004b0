"""Untrusted files: none of their code runs, and nothing outside `run.dir` is written.

Every payload would create the file `executed` next to the run folder. Each is refused with one line, or
is harmless.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from offline_align import lineage
from offline_align.__main__ import run
from offline_align.lineage.manifest import _sealed
from tests.stages.payloads import PAYLOADS, Payload, Refusal, code
from tests.training import pairs, samples, train, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and a Hugging Face policy, shared by the tests and never changed."""
    folder = tmp_path_factory.mktemp("untrusted")
    policy = train("sft", folder / "policy", write_jsonl(folder / "rows.jsonl", samples()), "trainer.max_steps=1")
    write_jsonl(folder / "prompts.jsonl", [{"id": "a", "prompt": "Name red"}])
    words = ["convert", f"init.from={policy}", f"run.dir={folder / 'hf'}", "run.device=cpu"]
    assert run(words) == 0
    reward = [f"init.from={policy}", "data.max_length=128", "run.device=cpu", "trainer.max_steps=1"]
    train("reward", folder / "reward", write_jsonl(folder / "pairs.jsonl", pairs()), *reward, model=[])
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A folder with copies of the originals, which a payload may change."""
    for name in ("policy", "hf", "reward", "rows.jsonl", "prompts.jsonl", "pairs.jsonl"):
        if (base / name).is_dir():
            shutil.copytree(base / name, tmp_path / name, symlinks=True)
        else:
            shutil.copy(base / name, tmp_path / name)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    """Return the content of all files outside the run folder, by path."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "out"))
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def _stay(tmp_path: Path) -> Iterator[None]:
    here = Path.cwd()
    yield
    os.chdir(here)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p.__name__)
def test_nothing_runs_and_nothing_is_written_outside(
    place: Path,
    payload: Callable[[Path, Path], Refusal],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Code in the files must not run even if the environment turns off safe loading in torch.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = place / "executed"
    words, expected = payload(place, marker)
    before = everything(place)
    words = [word for word in words if word != "debug=true"]
    assert run(words) in expected, capfd.readouterr().err
    assert not marker.exists()
    assert everything(place) == before
    assert "Traceback" not in capfd.readouterr().err


def test_the_payloads_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "pickled")))
    exec(code(tmp_path / "code"))
    assert {path.name for path in tmp_path.iterdir()} == {"pickled", "code"}


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/hostname", "a/../../secret", "link", "x\0y", "n" * 300, "n" * 100_000, "d/" * 3000, 3, None],
    ids=lambda path: str(path)[:12].replace("\0", "NUL"),
)
def test_paths_of_a_hostile_manifest_are_not_followed(
    tmp_path: Path, path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hash of the manifest matches, since anybody can compute it."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "secret").write_text("x")
    (run_dir / "link").symlink_to(tmp_path / "secret")
    record = {"path": path, "sha256": lineage.file_sha256(tmp_path / "secret"), "bytes": 1}
    manifest = asdict(lineage.Manifest("label", "k", "now", {}, [], [], [], {}))
    (run_dir / "manifest.json").write_bytes(_sealed(manifest | {"outputs": [record]}))
    assert run(["verify", f"run.dir={run_dir}"]) == 74
    # Inputs may be anywhere, since they are only hashed.
    (run_dir / "manifest.json").write_bytes(_sealed(manifest | {"inputs": [record]}))
    assert run(["verify", f"run.dir={run_dir}"]) == (0 if path in ("../secret", "link") else 74)
    assert "internal error" not in capsys.readouterr().err


def test_an_endless_chain_of_parents_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(400):
        (tmp_path / f"r{k}").mkdir()
        parent = {"path": f"../r{k + 1}", "stage": "sft", "manifest_sha256": "", "content_sha256": ""}
        manifest = asdict(lineage.Manifest("sft", "k", "now", {}, [], [], [], {})) | {"parents": [parent]}
        (tmp_path / f"r{k}" / "manifest.json").write_bytes(_sealed(manifest))
    assert run(["verify", f"run.dir={tmp_path / 'r0'}"]) == 74
    assert "generations back" in capsys.readouterr().err
