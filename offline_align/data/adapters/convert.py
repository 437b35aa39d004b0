"""From published rows to ours: recognise the form, convert, check.

Two kinds of loss are kept apart. A row that is not what its form promises (a missing column, a wrong
type) is a bad row and obeys `data.on_bad_row`. A sound row that gives nothing to learn from (two equal
answers, an empty one) is dropped and counted: the published sets have many of those.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from offline_align.data.adapters.columns import DroppedRow, without
from offline_align.data.adapters.hh import hh
from offline_align.data.adapters.instructions import dolly, flan, self_instruct
from offline_align.data.adapters.oasst1 import Node, oasst1_nodes, oasst1_rows
from offline_align.data.jsonl import BadRows, Line, RowError
from offline_align.data.records import PreferencePair, Sample, parse_row, text_id

ROW_ADAPTERS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "hh": hh,
    "dolly": dolly,
    "flan": flan,
    "self_instruct": self_instruct,
}
OWN_FORMS: dict[str, type[Sample] | type[PreferencePair]] = {"sft": Sample, "preference": PreferencePair}
FORMS = (*ROW_ADAPTERS, "oasst1", *OWN_FORMS)


@dataclass(frozen=True, slots=True)
class Converted:
    """A row of ours, and the line that it comes from where it comes from one alone."""

    row: dict[str, Any]
    line: Line | None = None


def recognise(columns: dict[str, Any]) -> str:
    """Return the form that a row has, by the names of its columns; RowError where it has none of them."""
    names = columns.keys()
    if names >= {"message_id", "text", "role"} or isinstance(columns.get("prompt"), dict):
        return "oasst1"
    if {"chosen", "rejected"} & names:
        return "preference" if "prompt" in names else "hh"
    if names >= {"prompt", "response"}:
        return "sft"
    if names >= {"instruction", "response"}:
        return "dolly"
    if names >= {"inputs", "targets"}:
        return "flan"
    if names >= {"instruction", "instances"} or names >= {"prompt", "completion"}:
        return "self_instruct"
    raise RowError(f"columns: no known form; prepare.format takes {', '.join(FORMS)}")


def convert(
    lines: Iterable[Line], form: str | None, name: str, bad_rows: BadRows, drops: Counter[str]
) -> Iterator[Converted]:
    """Yield our rows of the lines of one input; a `form` of None is recognised row by row.

    A row without an id of its own becomes `<name>:<line number>`. Dropped rows are counted in `drops`;
    DataError for a bad row unless those are skipped.
    """
    nodes: list[Node] = []
    for line in lines:
        try:
            found = form or recognise(line.value)
            if found == "oasst1":
                nodes += oasst1_nodes(line.value)
                continue
            row_id = f"{name}:{line.number}"
            rows = [_own(line, found, row_id)] if found in OWN_FORMS else _adapted(line, found, row_id, drops)
        except DroppedRow as dropped:
            drops[str(dropped)] += 1
        except RowError as error:
            line.reject(bad_rows, str(error))
        else:
            yield from rows
    yield from (Converted(row) for row in oasst1_rows(nodes, drops) if _is_usable(row, drops))


def _own(line: Line, form: str, row_id: str) -> Converted:
    row = parse_row(line.value, OWN_FORMS[form], row_id)
    is_named = row.columns.get("id") is not None
    return Converted(row.columns if is_named else {"id": row.id} | without(row.columns, "id"), line)


def _adapted(line: Line, form: str, row_id: str, drops: Counter[str]) -> list[Converted]:
    own_id = text_id(line.value.get("id"))
    row_id = own_id if isinstance(own_id, str) and own_id.strip() else row_id
    rows = ROW_ADAPTERS[form](line.value)
    ids = [row_id] if len(rows) == 1 else [f"{row_id}-{number}" for number in range(1, len(rows) + 1)]
    named = [{"id": i, "source": form} | without(row, "id") for i, row in zip(ids, rows, strict=True)]
    return [Converted(row, line) for row in named if _is_usable(row, drops)]


def _is_usable(row: dict[str, Any], drops: Counter[str]) -> bool:
    try:
        parse_row(row, PreferencePair if "chosen" in row else Sample, row["id"])
    except RowError as error:
        drops[str(error)] += 1
        return False
    return True
