"""Rows of tables: CSV, TSV, Parquet and Arrow. Each yields a row number or line, and a row.

The cells of CSV and TSV stay text. An empty cell, and a float that is not a number, is a missing
value: null.
"""

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from offline_align.data.file_kinds import ARROW_FILE, inner_suffix
from offline_align.data.jsonl import FIXES, NOT_UTF8, BadRows, RowError, numbered_lines
from offline_align.errors import DataError

BATCH_ROWS = 1000
_VALUES = ("rank", "margin", "deleted", "synthetic", "review_result")
"""Columns of known forms that never hold text."""
_DELIMITERS = (",", ";", "\t")

type Numbered = Iterator[tuple[int, Any]]
"""Rows with their numbers. A row may be a RowError instead, for one that cannot be read."""


def text_table(path: Path, bad_rows: BadRows) -> Numbered:
    """Yield the rows of a CSV or TSV file by the line on which each starts.

    The first line names the columns. A column without a name, such as the index of a data frame, is
    left out. Raises DataError for a file that is not a table.
    """
    csv.field_size_limit(sys.maxsize)
    lines = _decoded(path, bad_rows)
    number, header = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not header:
        return
    delimiter = "\t" if inner_suffix(path) == ".tsv" else max(_DELIMITERS, key=header.count)
    rest = (line for _, line in lines)
    last = number - 1  # the last line of the row before
    try:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, strict=True))]
        _check_names(path, number, names)
        last, reader = number, csv.reader(rest, delimiter=delimiter, strict=True)
        for cells in reader:
            if cells:
                yield last + 1, _row(names, cells)
            last = number + reader.line_num
    except csv.Error as error:
        kind = inner_suffix(path)[1:]
        raise DataError(f"{path}:{last + 1}: {kind}: {error}; check the quotes around the fields") from error


def _decoded(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    for number, raw in numbered_lines(path, bad_rows, jsonl_only=False):
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: {NOT_UTF8}; {FIXES[NOT_UTF8]}") from error


def _check_names(path: Path, number: int, names: list[str]) -> None:
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise DataError(f"{path}:{number}: header: {twice[0]} occurs twice; rename one of the columns")


def _row(names: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(names):
        return RowError(f"table: {len(cells)} fields, but the header has {len(names)}")
    return {name: _value(name, cell) for name, cell in zip(names, cells, strict=True) if name}


def _value(name: str, cell: str) -> Any:
    if name in _VALUES:
        try:
            return json.loads(cell.strip().lower() or "null")
        except ValueError:
            return cell
    return _messages(cell) or cell or None


def _messages(cell: str) -> Any:
    """Return a message or a list of them that is written as JSON into a cell; None for any other cell."""
    if not cell.startswith(("[", "{")):
        return None
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    items = found if isinstance(found, list) else [found]
    return found if all(isinstance(i, dict) and ("role" in i or {"from", "value"} <= i.keys()) for i in items) else None


def parquet_rows(path: Path) -> Numbered:
    """Yield the rows of a Parquet file; raises DataError if it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:1: parquet: cannot be read; fetch the file again") from error


def arrow_rows(path: Path) -> Numbered:
    """Yield the rows of an Arrow file (Feather) or stream (`save_to_disk` of `datasets`).

    Raises DataError if it is damaged.
    """
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            file.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(file)
                yield from _numbered(reader.get_batch(n) for n in range(reader.num_record_batches))
            else:
                yield from _numbered(pyarrow.ipc.open_stream(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}:1: arrow: cannot be read; fetch the file again") from error


def _numbered(batches: Any) -> Numbered:
    number = 0
    for batch in batches:
        for row in (row for part in _parts(batch) for row in part.to_pylist()):
            number += 1
            yield number, _without_nan(row)


def _parts(batch: Any) -> Iterator[Any]:
    """Yield slices of a batch, which may hold a whole file."""
    return (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
