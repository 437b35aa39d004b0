"""Select the answers to score: one of an SFT row, two of a pair, and none of a row that does not fit."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from offline_align.config.sections import DataSection
from offline_align.data.fate import say_what_fits
from offline_align.data.jsonl import BadRows
from offline_align.data.records import PreferencePair, Sample, TrainingRow, reject_rows
from offline_align.data.template import Renderer
from offline_align.data.token_store import REFUSED
from offline_align.data.tokenize import unusable_samples
from offline_align.errors import DataError

logger = logging.getLogger(__name__)


def single_answers(rows: Sequence[Sample | PreferencePair]) -> Iterator[Sample]:
    """Yield a sample for each answer to score: one of an SFT row, two of a pair (chosen first).

    Other columns are kept. For a pair, the column `answer` is `chosen` or `rejected`.
    """
    for row in rows:
        if isinstance(row, Sample):
            yield row
            continue
        both = (("chosen", row.chosen, row.rejected), ("rejected", row.rejected, row.chosen))
        for answer, text, other in both:
            columns = {k: v for k, v in row.columns.items() if k not in ("chosen", "rejected")}
            columns |= {"response": text, "answer": answer, "id": row.id}
            yield Sample(f"{row.id}/{answer}", row.prompt, text, columns, beside=other, file=row.file)


def check_answers(rows: Sequence[Sample | PreferencePair], best_of: int, files: Sequence[Path]) -> None:
    """Raise DataError for the first row that is not an answer of `generate`, which best-of-n needs."""
    other = next((row for row in rows if "finish_reason" not in row.columns or row.columns.get("id") is None), None)
    if other is not None:
        raise DataError(
            f"label.best_of={best_of}: row {other.id} of {', '.join(map(str, files))} is not an answer of "
            "`generate`; give generations.jsonl as data.input"
        )


def leave_out_unscorable(
    rows: Sequence[Sample | PreferencePair],
    files: Sequence[Path],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    bad_rows: BadRows,
) -> tuple[list[Sample | PreferencePair], dict[str, str]]:
    """Return the rows of `files` whose answers can all be scored, and the ids of those that do not fit.

    Each id has its reason, as in training. A pair is left out as a whole. Rows that the chat template
    refuses become bad rows. Raises DataError, naming file and line, for the first bad row unless bad
    rows are skipped, and if no row is left.
    """
    refused: dict[str, str] = {}
    left_out: dict[str, str] = {}
    answers = [(row.id, answer) for row in rows for answer in single_answers([row])]
    found = unusable_samples([TrainingRow(a) for _, a in answers], renderer, data, cache_dir, empty_answers=True)
    for place, status in found.items():
        group = refused if status.startswith(REFUSED) else left_out
        group.setdefault(answers[place][0], status.removeprefix(REFUSED))
    reject_rows(files, Sample, refused, bad_rows, and_pairs=True)
    left = [row for row in rows if row.id not in refused]
    if not left:
        raise DataError(f"{', '.join(map(str, files))}: the chat template refuses every row")
    if left_out:
        say_what_fits(logger, len(left), 0, Counter(left_out.values()), data)
    return [row for row in left if row.id not in left_out], left_out
