"""The errors that a user can see, each with the exit code of the process.

Codes 65, 70, 74, 75 and 78 come from BSD's sysexits. 75 asks a scheduler to run the job again.
"""

import contextlib
import json
import os
import time
from pathlib import Path


class AlignError(Exception):
    """Base class of errors that are reported as one line instead of a traceback."""

    exit_code = 70


class DataError(AlignError):
    """A row or a data file cannot be used; the message starts with `file:line: field:`."""

    exit_code = 65


class StorageError(AlignError):
    """A file could not be written or read back in full: disk full, read-only, damaged."""

    exit_code = 74


class StoppedEarly(AlignError):
    """The run stopped before its end and has saved everything: the same command continues it."""

    exit_code = 75


class ConfigError(AlignError):
    """One or more settings are wrong; the message has one line for each problem.

    All problems are reported at once, before a process group exists.
    """

    exit_code = 78

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class FailedOnMainRank(AlignError):
    """Rank 0 has failed and reports its error; this rank ends silently with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that fails with `error`."""
    if isinstance(error, AlignError):
        return error.exit_code
    return StorageError.exit_code if isinstance(error, OSError) else AlignError.exit_code


def write_error_file(exit_code: int, message: str) -> None:
    """Write this rank's error to TORCHELASTIC_ERROR_FILE, in torchrun's format.

    Launchers take the earliest of these files as the cause of a failure. Does nothing if the
    variable is not set or the file cannot be written; the exit code still reports the failure.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not message:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    record = {"message": {"message": message, "extraInfo": extra, "errorCode": exit_code}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(record), encoding="utf-8")
