"""The error file that a rank writes for its launcher, and what the launcher makes of it."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from offline_align.errors import AlignError, write_error_file
from offline_align.launch import _common_exit_code, _log_first_error


def test_the_error_file_has_torchruns_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    path = tmp_path / "rank_3.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    write_error_file(65, 'rows.jsonl:1: "x" is missing')
    failure = ProcessFailure(local_rank=3, pid=1, exitcode=65, error_file=str(path))
    assert failure.message["message"] == 'rows.jsonl:1: "x" is missing'  # type: ignore[index]
    assert failure.timestamp > 1.7e9
    assert json.loads(path.read_text())["message"]["errorCode"] == 65


def test_no_error_file_without_a_launcher_or_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    write_error_file(65, "lost")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "record"))
    write_error_file(65, "")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "record"))
    write_error_file(65, "cannot be written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rank", "code", "message", "said"),
    [
        (1, 70, {"message": "boom"}, "first error, rank 1: boom"),
        # `_common_exit_code` names a rank that was killed.
        (1, -9, "Signal 9 (SIGKILL) received by PID 7", None),
        (0, 70, {"message": "rank 0 has reported it itself"}, None),
        (1, 75, {"message": "stopped by SIGTERM"}, None),
    ],
)
def test_the_first_error_of_another_rank_is_reported(
    rank: int, code: int, message: object, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        _log_first_error(rank, SimpleNamespace(exitcode=code, message=message))
    assert [record.getMessage() for record in caplog.records] == ([said] if said else [])


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ({0: 70, 1: 78}, 78),
        ({0: 75, 1: 65}, 65),
        ({0: 75, 1: 75}, 75),
        ({0: -15, 1: 75}, 75),
        # The launcher stopped rank 0 after rank 1 failed. With 75, a scheduler would restart the job.
        ({0: 75, 1: 70}, 70),
        ({0: -15, 1: 70}, 70),
        ({0: -9, 1: 74}, 74),
    ],
)
def test_ranks_that_end_for_different_reasons_have_one_exit_code(codes: dict[int, int], outcome: int) -> None:
    assert _common_exit_code(codes) == outcome


@pytest.mark.parametrize("other", [70, 75, -15])
def test_a_killed_rank_is_named_however_the_others_ended(other: int) -> None:
    with pytest.raises(AlignError, match="rank 1 was ended by SIGKILL") as error:
        _common_exit_code({0: other, 1: -9})
    assert error.value.exit_code == 70
