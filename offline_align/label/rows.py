"""Select the answers to score: one of an SFT row, two of a pair, and none of a row that does not fit."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from offline_align.config.sections import DataSection
from offline_align.data.jsonl import BadRows
from offline_align.data.records import PreferencePair, Sample, TrainingRow, reject_rows
from offline_align.data.template import Renderer
from offline_align.data.token_store import REFUSED
from offline_align.data.tokenize import unusable_samples
from offline_align.errors import DataError


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
            yield Sample(f"{row.id}/{answer}", row.prompt, text, columns, beside=other)


def leave_out_unscorable(
    rows: Sequence[Sample | PreferencePair],
    files: Sequence[Path],
    renderer: Renderer,
    data: DataSection,
    cache_dir: Path,
    bad_rows: BadRows,
) -> list[Sample | PreferencePair]:
    """Return the rows of `files` whose answers can all be scored; the others become bad rows.

    A pair is left out as a whole. Raises DataError, naming file and line, for the first bad row
    unless bad rows are skipped, and if no row is left.
    """
    reasons: dict[str, str] = {}
    answers = [(row.id, answer) for row in rows for answer in single_answers([row])]
    found = unusable_samples([TrainingRow(a) for _, a in answers], renderer, data, cache_dir, empty_answers=True)
    for place, status in found.items():
        reasons.setdefault(answers[place][0], _reason(status, data))
    reject_rows(files, Sample, reasons, bad_rows, and_pairs=True)
    if len(reasons) == len(rows):
        raise DataError(f"{', '.join(map(str, files))}: no row can be scored; see data.max_length={data.max_length}")
    return [row for row in rows if row.id not in reasons]


def _reason(status: str, data: DataSection) -> str:
    """Return why a row cannot be scored, and the fix."""
    if status == "response_too_long":
        return f"response: too long to be scored, raise data.max_length={data.max_length}"
    if status == "too_long":
        fix = "or set data.too_long=truncate_prompt"
        return f"prompt: too long to be scored, raise data.max_length={data.max_length} {fix}"
    return status.removeprefix(REFUSED)
