"""One part of the report: a question with its findings, numbers, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offline_align.evaluate.figures.canvas import Picture


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text cells; the first column names the row, the others hold numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    prose: bool = False
    """Whether cells hold sentences, which need line wrapping."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its caption."""

    caption: str
    note: str
    picture: "Picture"


@dataclass(frozen=True, slots=True)
class Section:
    """The answer to one question.

    `name` is its key in `report.json` and its anchor on the page; `title` is the question.
    """

    name: str
    title: str
    note: str
    findings: list[str]
    content: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)


def contents(sections: Sequence[Section]) -> dict[str, Any]:
    """Return the entries of the sections in `report.json`."""
    return {section.name: {"findings": section.findings, **section.content} for section in sections}
