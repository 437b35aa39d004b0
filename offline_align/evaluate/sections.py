"""A part of the report: findings in words, tables, figures, and the numbers behind them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offline_align.evaluate.figures.canvas import Picture


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells; the first column names the row, all others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    prose: bool = False
    """Whether cells hold sentences, which are to be broken into lines."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its caption."""

    caption: str
    note: str
    picture: "Picture"


@dataclass(frozen=True, slots=True)
class Section:
    """What one question was answered with; `name` is its key in `report.json` and its anchor on the page."""

    name: str
    title: str
    note: str
    findings: list[str]
    content: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)


def contents(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the part of `report.json` that the sections write."""
    return {section.name: {"findings": section.findings, **section.content} for section in sections}
