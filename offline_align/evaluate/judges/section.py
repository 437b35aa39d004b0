"""The report's part on a served judge: what it cost, what could not be read, whether place sways it."""

from collections.abc import Mapping
from typing import Any

from offline_align.evaluate.sections import Section, Table

NOTE = (
    "Answers change places from prompt to prompt, so that each stands in every place equally often: what a place gains "
    "on average is a habit of the judge, not a merit of the answers."
)


def judge_section(described: Mapping[str, Any]) -> Section | None:
    """Return the part for a served judge, None for others."""
    if described["kind"] != "openai":
        return None
    places = described["places"]
    rows = [[f"place {p['place']}", f"{p['above_mean']:+.2f} [{p['low']:+.2f}, {p['high']:+.2f}]"] for p in places]
    tables = [Table("Effort", ["of the judge", "count"], _effort(described))]
    if places:
        title = f"Score by place, against the mean of a question ({places[0]['questions']} questions)"
        tables.append(Table(title, ["place", "above the mean"], rows))
    return Section("judge_effort", "The judge", NOTE, _findings(described), {}, tables)


def _effort(described: Mapping[str, Any]) -> list[list[str]]:
    names = ("verdicts", "asked_again", "unreadable_verdicts", "prompt_tokens", "completion_tokens")
    rows = [[name.replace("_", " "), f"{described[name]:,}"] for name in names]
    return [*rows, ["cost", f"{described['cost']:.4f}"]] if described["cost"] is not None else rows


def _findings(described: Mapping[str, Any]) -> list[str]:
    swayed = [p for p in described["places"] if not p["low"] <= 0 <= p["high"]]
    found = [f"An answer gains {p['above_mean']:+.2f} by standing in place {p['place']}." for p in swayed]
    if described["places"] and not swayed:
        found = ["No place gains or loses more than chance explains."]
    unread = described["unreadable_verdicts"]
    return found + ([f"{unread} of {described['verdicts']} verdicts could not be read."] if unread else [])
