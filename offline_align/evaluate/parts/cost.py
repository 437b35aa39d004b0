"""What each method cost, stage by stage, from the manifests behind its answers: the paper's Table 3.

A stage that several methods build on counts in full for each of them: it is what this method alone would have cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.ancestry import Ancestor, find_ancestors
from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.sections import Section, Table

NOTE = (
    "Hours of work times ranks, as each run's manifest records them, summed over all runs behind a method's answers. "
    "Shared stages count in full for each method. A rank is a GPU where the device is cuda; elsewhere the hours are "
    "those of processes, which are no GPU hours."
)
ORDER = ("prepare", "sft", "reward", "label", "fa", "rwr", "ca", "convert", "generate")


@dataclass(frozen=True, slots=True)
class _Cost:
    hours: dict[str, float]
    """By stage; only of runs that recorded their time."""
    unrecorded: tuple[str, ...]
    devices: frozenset[str]

    @property
    def total(self) -> float | None:
        """Hours of all stages; None where none recorded any, which is not the same as no cost."""
        return sum(self.hours.values()) if self.hours else None


def cost_section(comparison: Comparison, settings: EvaluateSection) -> Section | None:
    """Return hours by stage and method, or None where no run behind the answers recorded its time."""
    costs = {column.name: _cost(find_ancestors([column.path.parent])) for column in comparison.columns}
    if not any(cost.hours for cost in costs.values()):
        return None
    content = {
        "ppo_hours": settings.ppo_hours,
        "methods": {
            name: {
                "hours": cost.hours,
                "total_hours": cost.total,
                "devices": sorted(cost.devices),
                "stages_without_time": list(cost.unrecorded),
                "share_of_ppo": _share(cost.total, settings.ppo_hours),
            }
            for name, cost in costs.items()
        },
    }
    return Section("cost", "What did it cost?", NOTE, _findings(content, costs), content, [_table(content)])


def _cost(runs: Sequence[Ancestor]) -> _Cost:
    hours: dict[str, float] = {}
    unrecorded, devices = [], set()
    for run in runs:
        known = run_hours(run.manifest.extra)
        if known is None:
            unrecorded.append(run.stage)
            continue
        hours[run.stage] = hours.get(run.stage, 0.0) + known
        devices.add(str(run.manifest.extra.get("device", "unknown")))
    ordered = {stage: hours[stage] for stage in sorted(hours, key=_place)}
    return _Cost(ordered, tuple(dict.fromkeys(unrecorded)), frozenset(devices))


def run_hours(extra: Mapping[str, Any]) -> float | None:
    """Return a run's hours times ranks, or None where its manifest does not record them."""
    seconds, ranks = extra.get("seconds"), extra.get("ranks", 1)
    known = isinstance(seconds, int | float) and isinstance(ranks, int)
    return seconds * ranks / 3600 if known else None


def _share(hours: float | None, ppo_hours: float | None) -> float | None:
    return None if hours is None or not ppo_hours else hours / ppo_hours


def _place(stage: str) -> tuple[int, str]:
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def _findings(content: Mapping[str, Any], costs: Mapping[str, _Cost]) -> list[str]:
    lines = []
    if content["ppo_hours"]:
        lines += [
            f"{name}: {found['total_hours']:.3g} hours, {found['share_of_ppo']:.1%} of PPO's {content['ppo_hours']:g}."
            for name, found in content["methods"].items()
            if found["total_hours"] is not None
        ]
    missing = sorted({stage for cost in costs.values() for stage in cost.unrecorded})
    if missing:
        lines.append(f"No time is recorded for {', '.join(missing)}: the sums leave these runs out.")
    if any(cost.devices - {"cuda"} for cost in costs.values()):
        lines.append("Some of these runs were on no GPU: their hours are not GPU hours.")
    return lines


def _table(content: Mapping[str, Any]) -> Table:
    methods = content["methods"]
    stages = sorted({stage for found in methods.values() for stage in found["hours"]}, key=_place)
    header = ["hours", *stages, "total"] + ["of PPO"] * bool(content["ppo_hours"])
    rows = []
    for name, found in methods.items():
        row = [name, *(f"{found['hours'][s]:.3g}" if s in found["hours"] else "" for s in stages)]
        total, share = found["total_hours"], found["share_of_ppo"]
        row.append("unknown" if total is None else f"{total:.3g}")
        rows.append(row + ["unknown" if share is None else f"{share:.1%}"] * bool(content["ppo_hours"]))
    return Table("Hours by stage", header, rows)
