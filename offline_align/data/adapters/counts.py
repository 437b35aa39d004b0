"""Count what happens to the rows and columns of one input; the counts add up."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline_align.data.adapters.columns import TEXTS, is_blank
from offline_align.data.jsonl import HUB_PREFIX
from offline_align.data.records import without_suffixes
from offline_align.wording import counted

KINDS = {"sft": "SFT row", "preferences": "pair", "labelled": "labelled row"}
"""The kinds of rows that `prepare` makes, by the first part of the names of their files."""


@dataclass
class ColumnUse:
    """The rows of one form, and their non-blank columns, in order of first occurrence."""

    rows: int = 0
    made: Counter[str] = field(default_factory=Counter)
    """Rows made of them, by kind."""
    read: dict[str, None] = field(default_factory=dict)
    kept: dict[str, None] = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the rows and uses that occur, as `2 SFT rows; read instruction, response; kept category`."""
        made = [counted(number, KINDS[kind]) for kind, number in self.made.items() if number]
        uses = {"read": self.read, "kept": self.kept, "left out": self.left_out}
        told = [f"{use} {', '.join(names)}" for use, names in uses.items() if names]
        return "; ".join([*([" and ".join(made)] if made else []), *told])


@dataclass
class InputCounts:
    """The counts of one input; each message of a nested tree counts as a row.

    A row read is used in one of our rows, dropped or bad. A row made from it is kept, dropped or
    bad: `rows_read - rows_used + rows_made = rows_kept + dropped + bad_rows`.
    """

    name: str
    rows_read: int = 0
    rows_used: int = 0
    rows_made: int = 0
    rows_kept: int = 0
    bad_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    forms: dict[str, ColumnUse] = field(default_factory=dict)
    columns: dict[str, None] = field(default_factory=dict)
    """The names of all columns, also of dropped rows, in order of first occurrence."""
    unknown: str | None = None
    """The first row of no known form: its place, and what is missing."""

    @property
    def source(self) -> str:
        """The name of the input without `hf:` or the suffix of its file."""
        is_hub = self.name.startswith(HUB_PREFIX)
        return self.name.removeprefix(HUB_PREFIX) if is_hub else without_suffixes(Path(self.name).name)

    def note(self, form: str, columns: dict[str, Any], read: Iterable[str], kept: Iterable[str]) -> None:
        """Count a row of `form` and the use of each of its columns."""
        use = self.forms.setdefault(form, ColumnUse())
        use.rows += 1
        read, kept = set(read), set(kept)
        for name in (name for name, value in columns.items() if not is_blank(value)):
            place = use.read if name in read else use.kept if name in kept else use.left_out
            place[name] = None

    def say(self, log: logging.Logger) -> None:
        """Log what was recognised and how columns were used; warn of texts that no stage will read."""
        for form, use in self.forms.items():
            log.info("%s: %s of the form %s: %s", self.name, counted(use.rows, "row"), form, use)
            if unread := [name for name in use.kept if name in TEXTS]:
                log.warning("%s: kept, but not part of prompt or answer: %s", self.name, ", ".join(unread))

    def described(self) -> dict[str, Any]:
        """Return the counts for `report.json`."""
        return {
            "name": self.name,
            "forms": {form: use.rows for form, use in self.forms.items()},
            "rows_read": self.rows_read,
            "rows_used": self.rows_used,
            "rows_made": self.rows_made,
            "rows_kept": self.rows_kept,
            "bad_rows": self.bad_rows,
            "dropped": dict(sorted(self.dropped.items())),
        }
