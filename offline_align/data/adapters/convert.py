"""Convert published rows to ours: recognise the form, convert, check and count.

There are two ways to lose a row. A row that violates its form (a missing column, a wrong type, a
text that the form does not read) is a bad row, and `data.on_bad_row` applies. A valid row with
nothing to learn from (two equal answers, an empty or a rejected answer) is dropped and counted;
published sets have many of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from offline_align.config.sections import OnBadRow, PrepareSection, Rated, Turns
from offline_align.data.adapters.columns import DroppedRow, is_blank, renamed, without
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.adapters.dialogues import prompt_of
from offline_align.data.adapters.forms import Form, recognise
from offline_align.data.adapters.messages import with_system
from offline_align.data.adapters.oasst1 import Node, oasst1_nodes, oasst1_rows
from offline_align.data.adapters.pairs import margin, side_scores
from offline_align.data.adapters.ratings import (
    REWARD,
    TIED,
    UNPAIRED,
    VERDICTS,
    pairs_of,
    rating,
    rating_column,
    verdict,
    weights,
)
from offline_align.data.adapters.unknown import UnknownForm
from offline_align.data.jsonl import BadRows, Line, RowError
from offline_align.data.records import PreferencePair, Sample, parse_row, text_id
from offline_align.errors import DataError

ANSWERS = ("response", "chosen", "rejected")
"""The columns by which stages recognise the kind of one of our rows."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One of our rows, and its line if it comes from a single line."""

    row: dict[str, Any]
    line: Line | None = None
    is_labelled: bool = False
    """Whether the row has its score in `reward_raw`."""

    @property
    def kind(self) -> str:
        """The first part of the name of the file that the row belongs to."""
        return "labelled" if self.is_labelled else "preferences" if "chosen" in self.row else "sft"


@dataclass
class _Made:
    """What becomes of one row: our rows, and the reasons for those that have nothing to learn from."""

    rows: list[Converted]
    dropped: list[str] = field(default_factory=list)


def convert(
    lines: Iterable[Line], settings: PrepareSection, bad_rows: BadRows, counts: InputCounts
) -> Iterator[Converted]:
    """Yield our rows made from the lines of one input; the form of each row is recognised.

    A row without an id gets `<name of the input>:<line number>`. `counts` is updated for everything
    but the number of lines. Raises DataError for a bad row unless bad rows are skipped, and always if
    no row is of a known form.
    """
    nodes: list[Node] = []
    waiting = _Neighbours(settings, counts)
    for line in lines:
        try:
            columns = renamed(line.value, settings.columns)
            counts.columns.update(dict.fromkeys(columns))
            found = recognise(columns, settings.format, settings.columns)
            if found.name == "oasst1":
                nodes += _messages(line, columns, found, counts)
                continue
            made = _made(line, columns, found, settings, counts)
        except DroppedRow as dropped:
            counts.dropped[str(dropped)] += 1
        except UnknownForm as error:
            _reject_unknown(line, error, bad_rows, counts)
        except RowError as error:
            line.reject(bad_rows, str(error))
        else:
            counts.dropped.update(made.dropped)
            counts.rows_made += len(made.dropped)
            if settings.rated is Rated.pairs and made.rows and made.rows[0].is_labelled:
                yield from waiting.add(made.rows[0], found.name)
                continue
            counts.rows_used += 1
            counts.rows_made += len(made.rows)
            yield from _counted(made.rows, found.name, counts)
    yield from waiting.close()
    for converted in _usable(map(Converted, oasst1_rows(nodes, counts)), counts):
        yield from _counted([converted], "oasst1", counts)
    if counts.unknown and not counts.forms:
        raise DataError(counts.unknown)


def _counted(rows: Iterable[Converted], form: str, counts: InputCounts) -> Iterator[Converted]:
    for converted in rows:
        counts.forms[form].made[converted.kind] += 1
        yield converted


def _reject_unknown(line: Line, error: UnknownForm, bad_rows: BadRows, counts: InputCounts) -> None:
    """Reject a row of no known form. If no other form was found before, skipping rows is no advice."""
    counts.unknown = counts.unknown or f"{line.path}:{line.number}: {error}"
    if bad_rows.on_bad_row is OnBadRow.fail and not counts.forms:
        raise DataError(counts.unknown)
    line.reject(bad_rows, str(error))


def _messages(line: Line, columns: dict[str, Any], form: Form, counts: InputCounts) -> list[Node]:
    """Return the messages of a line; each message counts as a row read."""
    nodes = oasst1_nodes(columns)
    counts.rows_read += len(nodes) - 1
    counts.note(form.name, line.value, form.reads, ())
    return nodes


def _made(line: Line, columns: dict[str, Any], form: Form, settings: PrepareSection, counts: InputCounts) -> _Made:
    """Return what becomes of one row. Raises DroppedRow if nothing does, and RowError."""
    sides = form.own is PreferencePair or form.name in ("pair", "hh")
    score = None if sides or form.many else rating(columns, settings)
    if form.own:
        row = _own(line, columns, form, counts)
        made = _Made([Converted(row, line)])
    else:
        last = settings if score is None else replace(settings, turns=Turns.last)
        made = _usable_only(_adapted(line, columns, form, last, counts), line)
    _note(line, columns, form, settings, made, counts, score is not None)
    if sides and settings.rated is Rated.labelled:
        return _Made([side for pair in made.rows for side in _labelled_sides(pair)], made.dropped)
    if sides and settings.rated is not Rated.ignore and (found := margin(columns)):
        return _Made([Converted(pair.row | found, line) for pair in made.rows], made.dropped)
    if form.many:
        return _Made(_from_answers(made, settings), made.dropped)
    if score is None:
        return made
    if len(made.rows) + len(made.dropped) > 1:
        raise RowError(
            "several answers share one rating; give each answer a row of its own, or set prepare.rated=ignore"
        )
    return _Made([Converted(c.row | {REWARD: score}, line, is_labelled=True) for c in made.rows], made.dropped)


def _own(line: Line, columns: dict[str, Any], form: Form, counts: InputCounts) -> dict[str, Any]:
    """Return one of our rows unchanged, but without blank answer columns of other forms in the table.

    A column `system` becomes the system message of the prompt.
    """
    assert form.own is not None
    others = [name for name in ANSWERS if name not in form.reads and is_blank(columns.get(name))]
    if form.own is Sample and (pair := {"chosen", "rejected"} & columns.keys() - {*others}):
        raise RowError(f"{min(pair)}: makes the row a preference pair; set prepare.format=preference, or remove it")
    row = parse_row(without(columns, *others), form.own, f"{counts.name}:{line.number}")
    prompt = row.columns["prompt"]
    read = prompt_of(prompt, row.columns) if isinstance(prompt, str) else with_system(prompt, row.columns)
    if read != prompt:
        row = parse_row(without(row.columns, "system") | {"prompt": read}, form.own, row.id)
    is_named = row.columns.get("id") is not None
    return row.columns if is_named else {"id": row.id} | without(row.columns, "id")


def _adapted(
    line: Line, columns: dict[str, Any], form: Form, settings: PrepareSection, counts: InputCounts
) -> list[dict[str, Any]]:
    assert form.adapt is not None
    own_id = text_id(columns.get("id"))
    row_id = own_id if isinstance(own_id, str) and own_id.strip() else f"{counts.name}:{line.number}"
    rows = form.adapt(columns, settings)
    ids = [row_id] if len(rows) == 1 else [f"{row_id}-{number}" for number in range(1, len(rows) + 1)]
    origin = {"source_id": row_id} if form.many else {}
    return [{"id": i, "source": form.name} | without(row, "id") | origin for i, row in zip(ids, rows, strict=True)]


def _note(
    line: Line,
    columns: dict[str, Any],
    form: Form,
    settings: PrepareSection,
    made: _Made,
    counts: InputCounts,
    is_scored: bool,
) -> None:
    """Count the use of the columns of a row, under the names of the input."""
    kept = {*(made.rows[0].row if made.rows else columns)}
    read = {*form.reads, "id", *weights(settings.score_column)}
    if verdict(columns) is not None:
        read |= {*VERDICTS}
    elif is_scored and not settings.score_column:
        read.add(str(rating_column(columns)))
    if settings.columns:
        for names in (read, kept):
            names |= {theirs for name, theirs in settings.columns.items() if name in names}
    counts.note(form.name, line.value, read, kept)


def _usable_only(rows: list[dict[str, Any]], line: Line) -> _Made:
    made = _Made([])
    for row in rows:
        reason = _fault(row)
        if reason is None:
            made.rows.append(Converted(row, line))
        else:
            made.dropped.append(reason)
    return made


def _usable(rows: Iterable[Converted], counts: InputCounts) -> Iterator[Converted]:
    """Count the rows made, and yield those with something to learn from."""
    for converted in rows:
        counts.rows_made += 1
        reason = _fault(converted.row)
        if reason is None:
            yield converted
        else:
            counts.dropped[reason] += 1


def _fault(row: dict[str, Any]) -> str | None:
    try:
        parse_row(row, PreferencePair if "chosen" in row else Sample, row["id"])
    except RowError as error:
        return str(error)
    return None


def _from_answers(made: _Made, settings: PrepareSection) -> list[Converted]:
    """Return labelled rows or pairs of the rated answers in one row.

    Raises DroppedRow if no two answers differ in their rating.
    """
    if settings.rated is Rated.labelled or (settings.rated is None and settings.score_column is not None):
        return [replace(answer, is_labelled=True) for answer in made.rows]
    pairs = list(pairs_of([answer.row for answer in made.rows], settings.pairs))
    if not pairs:
        raise DroppedRow(TIED)
    return [Converted(pair, made.rows[0].line) for pair in pairs]


def _labelled_sides(pair: Converted) -> list[Converted]:
    """Return the two answers of a pair as labelled rows, as `label` does; the pair if they have no ratings."""
    scores = side_scores(pair.row)
    if scores is None:
        return [pair]
    shared = without(pair.row, "chosen", "rejected", "margin", "id")
    rows = [
        {"id": f"{pair.row['id']}/{side}", **shared, "response": pair.row[side], "answer": side}
        | {REWARD: score, "source_id": pair.row["id"]}
        for side, score in zip(("chosen", "rejected"), scores, strict=True)
    ]
    return [Converted(row, pair.line, is_labelled=True) for row in rows]


class _Neighbours:
    """Rated answers to one prompt in consecutive rows, which become pairs when another prompt begins."""

    def __init__(self, settings: PrepareSection, counts: InputCounts) -> None:
        self._settings = settings
        self._counts = counts
        self._rows: list[Converted] = []
        self._form = ""

    def add(self, answer: Converted, form: str) -> list[Converted]:
        """Add an answer; return the pairs of the prompt before if this answer has another prompt."""
        ended = self.close() if self._rows and self._rows[0].row["prompt"] != answer.row["prompt"] else []
        self._rows.append(answer)
        self._form = form
        return ended

    def close(self) -> list[Converted]:
        """Return the pairs of the answers; count these as used, and those in no pair as dropped."""
        rows, self._rows = self._rows, []
        pairs = list(pairs_of([answer.row for answer in rows], self._settings.pairs)) if rows else []
        texts = {text for pair in pairs for text in (pair["chosen"], pair["rejected"])}
        used = sum(answer.row["response"] in texts for answer in rows)
        self._counts.rows_used += used
        self._counts.rows_made += len(pairs)
        if len(rows) > used:
            self._counts.dropped[UNPAIRED] += len(rows) - used
        return list(_counted(map(Converted, pairs), self._form, self._counts))
