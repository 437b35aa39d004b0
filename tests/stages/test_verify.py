"""The `verify` command: its output and exit codes."""

from pathlib import Path

import pytest

from offline_align.config.runs import VerifyRun
from offline_align.config.sections import RunSection
from offline_align.errors import ConfigError, StorageError
from offline_align.stages import verify
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES
from tests.runs import write_manifest


def settings(run_dir: Path, dry_run: bool = False) -> VerifyRun:
    return VerifyRun(run=RunSection(dir=str(run_dir)), dry_run=dry_run)


@pytest.fixture
def label_run(tmp_path: Path) -> Path:
    raw = tmp_path / "raw [1].jsonl"
    raw.write_text("raw\n")
    prepare, label = tmp_path / "prepare", tmp_path / "label"
    for run_dir, source in ((prepare, raw), (label, prepare / "rows.jsonl")):
        run_dir.mkdir()
        (run_dir / "rows.jsonl").write_text(run_dir.name)
        write_manifest(run_dir, run_dir.name, "key", [source], [], [run_dir / "rows.jsonl"], {})
    return label


def test_an_intact_run_shows_its_chain(label_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(Job(STAGES["verify"], settings(label_run))) == 0
    shown = capsys.readouterr().out
    assert "damaged" not in shown
    assert shown.index("label") < shown.index("prepare") < shown.index("raw [1].jsonl")


def test_damaged_ancestor_ends_with_74(label_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (label_run.parent / "prepare" / "rows.jsonl").write_text("PREPARE")
    with pytest.raises(StorageError, match=r"rows\.jsonl: damaged.*run the stage again") as error:
        verify.run(Job(STAGES["verify"], settings(label_run)))
    assert error.value.exit_code == 74
    assert "\n" not in str(error.value)
    assert "0 of 1 file whole" in capsys.readouterr().out


def test_a_missing_folder_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir=.*no such folder"):
        verify.run(Job(STAGES["verify"], settings(tmp_path / "none")))


def test_unfinished_run_ends_with_74(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="has not finished"):
        verify.run(Job(STAGES["verify"], settings(tmp_path)))


def test_dry_run_reads_nothing(label_run: Path) -> None:
    (label_run / "rows.jsonl").unlink()
    assert verify.run(Job(STAGES["verify"], settings(label_run, dry_run=True))) == 0


def test_a_shared_ancestor_is_listed_once(label_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = label_run.parent
    both = root / "both"
    both.mkdir()
    (both / "x").write_text("x")
    write_manifest(both, "ca", "key", [], [label_run, root / "prepare"], [both / "x"], {})
    verify.run(Job(STAGES["verify"], settings(both)))
    assert capsys.readouterr().out.count("raw [1].jsonl") == 1
