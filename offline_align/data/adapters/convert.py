"""Convert published rows to ours: recognise the form, convert, check and count.

There are two ways to lose a row. A row that violates its form (a missing column, a wrong type, a
text that the form does not read) is a bad row, and `data.on_bad_row` applies. A valid row with
nothing to learn from (two equal answers, an empty answer) is dropped and counted; published sets
have many of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from offline_align.data.adapters.columns import DroppedRow, is_blank, without
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.adapters.forms import Form, recognise
from offline_align.data.adapters.oasst1 import Node, oasst1_nodes, oasst1_rows
from offline_align.data.jsonl import BadRows, Line, RowError
from offline_align.data.records import PreferencePair, Sample, parse_row, text_id

ANSWERS = ("response", "chosen", "rejected")
"""The columns by which stages recognise the kind of one of our rows."""


@dataclass(frozen=True, slots=True)
class Converted:
    """One of our rows, and its line if it comes from a single line."""

    row: dict[str, Any]
    line: Line | None = None


def convert(lines: Iterable[Line], form: str | None, bad_rows: BadRows, counts: InputCounts) -> Iterator[Converted]:
    """Yield our rows made from the lines of one input; if `form` is None, each row's form is recognised.

    A row without an id gets `<name of the input>:<line number>`. `counts` is updated for everything
    but the number of lines. Raises DataError for a bad row unless bad rows are skipped.
    """
    nodes: list[Node] = []
    for line in lines:
        try:
            found = recognise(line.value, form)
            if found.name == "oasst1":
                nodes += _messages(line, found, counts)
                continue
            rows = iter([_own(line, found, counts)]) if found.own else _usable(_adapted(line, found, counts), counts)
        except DroppedRow as dropped:
            counts.dropped[str(dropped)] += 1
        except RowError as error:
            line.reject(bad_rows, str(error))
        else:
            counts.rows_used += 1
            yield from rows
    yield from _usable(map(Converted, oasst1_rows(nodes, counts)), counts)


def _messages(line: Line, form: Form, counts: InputCounts) -> list[Node]:
    """Return the messages of a line; each message counts as a row read."""
    nodes = oasst1_nodes(line.value)
    counts.rows_read += len(nodes) - 1
    counts.note(form.name, line.value, form.reads, ())
    return nodes


def _own(line: Line, form: Form, counts: InputCounts) -> Converted:
    """Return one of our rows unchanged, but without blank answer columns of other forms in the table."""
    assert form.own is not None
    others = [name for name in ANSWERS if name not in form.reads and is_blank(line.value.get(name))]
    if form.own is Sample and (pair := {"chosen", "rejected"} & line.value.keys() - {*others}):
        raise RowError(f"{min(pair)}: makes the row a preference pair; set prepare.format=preference, or remove it")
    row = parse_row(without(line.value, *others), form.own, f"{counts.name}:{line.number}")
    counts.note(form.name, row.columns, (*form.reads, "id"), row.columns)
    counts.rows_made += 1
    is_named = row.columns.get("id") is not None
    return Converted(row.columns if is_named else {"id": row.id} | without(row.columns, "id"), line)


def _adapted(line: Line, form: Form, counts: InputCounts) -> list[Converted]:
    assert form.adapt is not None
    own_id = text_id(line.value.get("id"))
    row_id = own_id if isinstance(own_id, str) and own_id.strip() else f"{counts.name}:{line.number}"
    rows = form.adapt(line.value)
    counts.note(form.name, line.value, (*form.reads, "id"), rows[0])
    ids = [row_id] if len(rows) == 1 else [f"{row_id}-{number}" for number in range(1, len(rows) + 1)]
    named = [{"id": i, "source": form.name} | without(row, "id") for i, row in zip(ids, rows, strict=True)]
    return [Converted(row, line) for row in named]


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
