"""Rows that do not fit into `data.max_length`: one rule and the same words in every stage.

The prompt is cut from the left, or the row is left out if `data.too_long=drop`. A row whose response
alone does not fit is left out, and so is a whole pair if one of its answers does not fit. Such a row
is counted and named, but it is not a bad row: it may fit with another setting.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from offline_align.config.sections import DataSection
from offline_align.data.jsonl import write_jsonl
from offline_align.errors import DataError, StorageError
from offline_align.wording import counted

FILE_NAME = "left_out.jsonl"
"""The file in a run folder that names each row left out, for stages whose output has a row for each."""


def reasons(dropped: Mapping[str, int]) -> str:
    """Return the counts of dropped rows by reason as text: `3 too_long, 1 no_target`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())


def say_what_fits(
    log: logging.Logger, asked: int, truncated: int, dropped: Mapping[str, int], data: DataSection, unit: str = "row"
) -> None:
    """Log how many of `asked` rows were cut or left out; a warning if any was left out.

    Raises DataError if no row is left.
    """
    gone = sum(dropped.values())
    if gone == asked:
        raise DataError(
            f"none of {counted(asked, unit)} is left: {reasons(dropped)}; see data.max_length={data.max_length}"
        )
    log.log(logging.WARNING if gone else logging.INFO, "%s", in_words(asked, truncated, dropped, data, unit))


def in_words(asked: int, truncated: int, dropped: Mapping[str, int], data: DataSection, unit: str = "row") -> str:
    """Return the numbers of rows that were cut and left out, with the key that decides it."""
    parts = [f"{counted(truncated, 'prompt')} cut from the left"] if truncated else []
    if gone := sum(dropped.values()):
        parts.append(f"{gone:,} left out ({reasons(dropped)})")
    all_fit = f"{'it fits' if asked == 1 else 'all fit'} into data.max_length={data.max_length}"
    what = f"{', '.join(parts)}; see data.max_length={data.max_length}" if parts else all_fit
    return f"{counted(asked, unit)}: {what}"


def write_left_out(run_dir: Path, left_out: Mapping[str, str]) -> Path:
    """Write `left_out.jsonl` with id and reason of each row, or remove an earlier one; return its path.

    Raises StorageError.
    """
    path = run_dir / FILE_NAME
    if left_out:
        write_jsonl(path, ({"id": row_id, "reason": reason} for row_id, reason in left_out.items()))
        return path
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror or error}") from error
    return path
