"""The report's part on a served judge: what it cost, what could not be read, whether place sways it."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline_align.evaluate.sections import Section, Table

NOTE = (
    "Answers change places from prompt to prompt, so that each stands in every place equally often: what a place gains "
    "on average is a habit of the judge, not a merit of the answers."
)


def judge_section(described: Mapping[str, Any], methods: Sequence[str] = ()) -> Section | None:
    """Return the part for a served judge, None for others; `methods` gave the answers of a set, in its order."""
    if described["kind"] != "openai":
        return None
    places = described["places"]
    rows = [[f"place {p['place']}", f"{p['above_mean']:+.2f} [{p['low']:+.2f}, {p['high']:+.2f}]"] for p in places]
    tables = [Table("Effort", ["of the judge", "count"], _effort(described))]
    if places:
        title = f"Score by place, against the mean of a question ({places[0]['questions']} questions)"
        tables.append(Table(title, ["place", "above the mean"], rows))
    tables += _unreadable(described, methods)
    return Section("judge_effort", "The judge", NOTE, _findings(described), {}, tables)


def _effort(described: Mapping[str, Any]) -> list[list[str]]:
    names = ("verdicts", "asked_again", "unreadable_verdicts", "prompt_tokens", "completion_tokens")
    rows = [[name.replace("_", " "), f"{described[name]:,}"] for name in names]
    return [*rows, ["cost", f"{described['cost']:.4f}"]] if described["cost"] is not None else rows


def _unreadable(described: Mapping[str, Any], methods: Sequence[str]) -> list[Table]:
    """Return why verdicts are missing, and how many of those that each method's answers stood in."""
    if not described["unreadable_verdicts"]:
        return []
    reasons = [[reason, f"{count:,}"] for reason, count in described["unreadable_reasons"].items()]
    tables = [Table("Verdicts that could not be read", ["reason", "count"], reasons)]
    if methods:
        counts = zip(methods, described["unreadable_by_answer"], strict=True)
        rows = [[method, f"{count:,}"] for method, count in counts]
        tables.append(Table("Verdicts that could not be read, by method", ["with an answer of", "count"], rows))
    return tables


def _findings(described: Mapping[str, Any]) -> list[str]:
    swayed = [p for p in described["places"] if not p["low"] <= 0 <= p["high"]]
    found = [f"An answer gains {p['above_mean']:+.2f} by standing in place {p['place']}." for p in swayed]
    if described["places"] and not swayed:
        found = ["No place gains or loses more than chance explains."]
    unread = described["unreadable_verdicts"]
    if unread:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in described["unreadable_reasons"].items())
        found.append(f"{unread} of {described['verdicts']} verdicts could not be read ({reasons}).")
    return found
