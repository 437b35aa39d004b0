"""The errors that a user can meet, each with the exit code that the process ends with.

Codes 65, 70, 74, 75 and 78 are those of BSD's sysexits; 75 asks a scheduler to run the job again.
"""

import contextlib
import json
import os
import time
from pathlib import Path


class AlignError(Exception):
    """Base of all errors that are reported as one plain line instead of a traceback."""

    exit_code = 70


class DataError(AlignError):
    """A row or a data file cannot be used; the message starts with `file:line: field:`."""

    exit_code = 65


class StorageError(AlignError):
    """A file could not be written or read back whole: disk full, read-only, damaged."""

    exit_code = 74


class StoppedEarly(AlignError):
    """The run stopped before its end with everything saved: the same command continues it."""

    exit_code = 75


class ConfigError(AlignError):
    """One or more settings are wrong; every problem found is a line of its own.

    Found before a process group exists, and all problems at once.
    """

    exit_code = 78

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class FailedOnMainRank(AlignError):
    """Rank 0 met an error and has reported it; this rank ends with the same exit code and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """Return the code that a process ends with after `error`."""
    if isinstance(error, AlignError):
        return error.exit_code
    return StorageError.exit_code if isinstance(error, OSError) else AlignError.exit_code


def leave_for_launcher(exit_code: int, message: str) -> None:
    """Write why this rank ends where its launcher asks for it, in torchrun's form: the first error is the cause.

    Does nothing where no launcher asks, or where the file cannot be written: the exit code says it too.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or not message:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    record = {"message": {"message": message, "extraInfo": extra, "errorCode": exit_code}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(record), encoding="utf-8")
