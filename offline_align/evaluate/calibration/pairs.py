"""Read pairs of answers with human verdicts: verdict rows, or preference rows of a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offline_align.data.jsonl import BadRows, RowError, read_objects
from offline_align.data.records import Message, PreferencePair, Prompt, Sample, parse_row
from offline_align.errors import DataError

VERDICTS = {
    "a-is-better": 1,
    "a-is-slightly-better": 1,
    "tie": 0,
    "b-is-slightly-better": -1,
    "b-is-better": -1,
}
_MAJORITY = {"a": 1, "tie": 0, "b": -1}


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """Two answers to one prompt, with the verdict of people."""

    id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    verdict: int
    """1 if people prefer the first answer, -1 if they prefer the second, 0 for a tie."""
    verdicts: tuple[int, ...]
    """The verdicts of the individual people, if known."""
    source: str


def read_judged_pairs(paths: Sequence[Path], bad_rows: BadRows) -> list[JudgedPair]:
    """Return the rows of verdict files and preference files, which may be mixed.

    A verdict row has `response_a`, `response_b` and `verdicts` (of several people) or `majority`.
    In every other preference row the chosen answer becomes the second, so position bias cannot
    raise the accuracy. Raises DataError for a bad row (unless skipped) and if no row is usable.
    """
    pairs: list[JudgedPair] = []
    for line in read_objects(paths, bad_rows):
        try:
            pairs.append(_parse(line.value, f"{line.path.name}:{line.number}", swap=len(pairs) % 2 == 1))
        except RowError as error:
            line.reject(bad_rows, str(error))
    if not pairs:
        raise DataError(f"{', '.join(map(str, paths))}: no pair that people have judged")
    return pairs


def both_orders(pairs: Sequence[JudgedPair]) -> list[Sample]:
    """Return four samples per pair: its answers in order, then reversed, with one `id` per order.

    Each sample carries the other answer of its pair in `beside`, so that a reward model reads both
    after the same context.
    """
    return [
        Sample(f"{k}/{pair.id}/{name}", pair.prompt, answer, {}, beside=other)
        for k, pair in enumerate(pairs)
        for name, answers in (("ab", pair.answers), ("ba", pair.answers[::-1]))
        for answer, other in (answers, answers[::-1])
    ]


def _parse(row: dict[str, Any], row_id: str, swap: bool) -> JudgedPair:
    if "chosen" in row or "rejected" in row:
        pair = parse_row(row, PreferencePair, row_id)
        answers = (pair.rejected, pair.chosen) if swap else (pair.chosen, pair.rejected)
        return JudgedPair(pair.id, pair.prompt, answers, -1 if swap else 1, (), str(row.get("source") or "all"))
    prompt = parse_row(row, Prompt, row_id)
    both = (row.get("response_a"), row.get("response_b"))
    if not isinstance(both[0], str) or not isinstance(both[1], str):
        raise RowError("response_a, response_b: missing or not strings")
    verdicts = _verdicts(row)
    source = f"{row['model_a']} / {row['model_b']}" if "model_a" in row and "model_b" in row else row.get("source")
    return JudgedPair(
        prompt.id, prompt.prompt, (both[0], both[1]), _majority(row, verdicts), verdicts, str(source or "all")
    )


def _verdicts(row: dict[str, Any]) -> tuple[int, ...]:
    given = row.get("verdicts", [])
    if not isinstance(given, list) or not all(isinstance(one, str) and one in VERDICTS for one in given):
        raise RowError(f"verdicts: not a list of {', '.join(VERDICTS)}")
    return tuple(VERDICTS[one] for one in given)


def _majority(row: dict[str, Any], verdicts: tuple[int, ...]) -> int:
    """Return the stated majority, else that of the verdicts; an even split is a tie."""
    stated = row.get("majority")
    if stated is not None:
        if stated not in _MAJORITY:
            raise RowError("majority: not a, b or tie")
        return _MAJORITY[stated]
    if not verdicts:
        raise RowError("verdicts: missing, and no majority")
    total = sum(verdicts)
    return (total > 0) - (total < 0)
