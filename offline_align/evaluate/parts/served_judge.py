"""Did a served judge work well? Its position bias, unreadable verdicts, token counts and cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline_align.evaluate.sections import Section, Table
from offline_align.wording import counted

NOTE = (
    "The order of the answers changes from prompt to prompt, so each method appears in every position equally often. "
    "A position that scores above the mean shows a bias of the judge, not better answers."
)


def judge_section(described: Mapping[str, Any], methods: Sequence[str] = ()) -> Section | None:
    """Return the section of a served judge, or None for others.

    `methods` names the answers of a set, in order.
    """
    if described["kind"] != "openai":
        return None
    places = described["places"]
    rows = [[str(p["place"]), f"{p['above_mean']:+.2f} [{p['low']:+.2f}, {p['high']:+.2f}]"] for p in places]
    tables = [Table("Usage", ["of the judge", "count"], _usage(described))]
    if places:
        title = f"Score by position, minus the mean score of the question ({places[0]['questions']} questions)"
        tables.append(Table(title, ["position", "above the mean"], rows))
    tables += _unreadable(described, methods)
    return Section("judge_effort", "Did the judge work well?", NOTE, _findings(described), {}, tables)


def _usage(described: Mapping[str, Any]) -> list[list[str]]:
    names = ("verdicts", "asked_again", "unreadable_verdicts", "prompt_tokens", "completion_tokens")
    rows = [[name.replace("_", " "), f"{described[name]:,}"] for name in names]
    return [*rows, ["cost", f"{described['cost']:.4f}"]] if described["cost"] is not None else rows


def _unreadable(described: Mapping[str, Any], methods: Sequence[str]) -> list[Table]:
    """Return why verdicts are missing, and how many missing verdicts concern each method."""
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
    biased = [p for p in described["places"] if not p["low"] <= 0 <= p["high"]]
    found = [
        f"Position bias: answers in position {p['place']} score {p['above_mean']:+.2f} against the mean."
        for p in biased
    ]
    if described["places"] and not biased:
        found = ["No position bias beyond chance."]
    unread = described["unreadable_verdicts"]
    if unread:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in described["unreadable_reasons"].items())
        verdicts = f"{unread} of {counted(described['verdicts'], 'verdict')} could not be read ({reasons})"
        found.append(f"{verdicts}; the replies are in `verdicts.jsonl`.")
    return found
