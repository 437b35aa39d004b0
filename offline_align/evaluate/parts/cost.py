"""What did each method cost? Hours by stage from the manifests (the paper's Table 3).

A stage that several methods share counts in full for each of them, so a total is what the method
would have cost alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.ancestry import Ancestor, find_ancestors
from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.sections import Section, Table
from offline_align.lineage import effort

NOTE = (
    "Wall-clock hours of whole commands times ranks, over all attempts, from the manifests of all runs behind a "
    "method's answers. Shared stages count in full for each method. A rank is a GPU if the device is cuda; otherwise "
    "the hours are process hours, not GPU hours. In the hours by activity, start is all time outside the other "
    "columns: imports, rendezvous of the ranks, building of the model."
)


@dataclass(frozen=True, slots=True)
class _Cost:
    hours: dict[str, float]
    """By stage, of the runs that recorded their time."""
    parts: dict[str, float]
    """Over all stages by activity, of the runs that recorded it."""
    in_part: tuple[str, ...]
    """Stages recorded by an earlier version, which did not count whole commands."""
    unrecorded: tuple[str, ...]
    """Stages without a recorded time."""
    devices: frozenset[str]

    @property
    def total(self) -> float | None:
        """Hours of all stages; None (not 0) if no stage recorded its time."""
        return sum(self.hours.values()) if self.hours else None


def cost_section(comparison: Comparison, settings: EvaluateSection) -> Section | None:
    """Return hours by stage and method, or None if no run behind the answers recorded its time."""
    runs = {column.name: find_ancestors([column.path.parent]) for column in comparison.columns}
    stages = stage_order(run for behind in runs.values() for run in behind)
    costs = {name: _cost(behind, stages) for name, behind in runs.items()}
    if not any(cost.hours for cost in costs.values()):
        return None
    content = {
        "ppo_hours": settings.ppo_hours,
        "methods": {
            name: {
                "hours": cost.hours,
                "total_hours": cost.total,
                "devices": sorted(cost.devices),
                "hours_by_part": cost.parts,
                "stages_recorded_in_part": list(cost.in_part),
                "stages_without_time": list(cost.unrecorded),
                "share_of_ppo": _share(cost.total, settings.ppo_hours),
            }
            for name, cost in costs.items()
        },
    }
    return Section(
        "cost", "What did it cost?", NOTE, _findings(content, costs), content, list(_tables(content, stages))
    )


def total_hours(comparison: Comparison) -> list[float | None]:
    """Return the hours of all runs behind each column's answers; None if no run recorded its time."""
    return [_cost(find_ancestors([column.path.parent]), []).total for column in comparison.columns]


def stage_order(runs: Iterable[Ancestor]) -> list[str]:
    """Return the stages by their greatest depth in the lineage, ties by first appearance."""
    depths: dict[str, int] = {}
    for run in runs:
        depths[run.stage] = max(run.depth, depths.get(run.stage, 0))
    return sorted(depths, key=depths.__getitem__)


def _cost(runs: Sequence[Ancestor], stages: Sequence[str]) -> _Cost:
    """Return the cost of runs, with the stages in the given order, or in that of the runs if it is empty."""
    hours: dict[str, float] = {}
    parts: dict[str, float] = {}
    in_part: list[str] = []
    unrecorded: list[str] = []
    devices = set()
    for run in runs:
        extra = run.manifest.extra
        known = run_hours(extra)
        if known is None:
            unrecorded.append(run.stage)
            continue
        hours[run.stage] = hours.get(run.stage, 0.0) + known
        devices.add(str(extra.get("device", "unknown")))
        for name, seconds in effort.parts(extra).items():
            parts[name] = parts.get(name, 0.0) + seconds / 3600
        in_part += [] if effort.is_whole(extra) else [run.stage]
    ordered = {stage: hours[stage] for stage in stages or hours if stage in hours}
    once, never = tuple(dict.fromkeys(in_part)), tuple(dict.fromkeys(unrecorded))
    return _Cost(ordered, parts, once, never, frozenset(devices))


def run_hours(extra: Mapping[str, Any]) -> float | None:
    """Return a run's hours times ranks, or None if its manifest does not record them."""
    seconds = effort.rank_seconds(extra)
    return None if seconds is None else seconds / 3600


def in_part_finding(names: Iterable[str]) -> list[str]:
    """Return a sentence on runs that an earlier version recorded in part, if there are any."""
    some = ", ".join(names)
    counted = "only the steps of training, and label and generate without start-up and tokenisation"
    line = f"{some}: recorded by an earlier version, which counted {counted}; the true cost is higher."
    return [line] if some else []


def _share(hours: float | None, ppo_hours: float | None) -> float | None:
    return None if hours is None or not ppo_hours else hours / ppo_hours


def _findings(content: Mapping[str, Any], costs: Mapping[str, _Cost]) -> list[str]:
    lines = []
    if content["ppo_hours"]:
        lines += [
            f"{name}: {found['total_hours']:.3g} hours, {found['share_of_ppo']:.1%} of PPO's {content['ppo_hours']:g}."
            for name, found in content["methods"].items()
            if found["total_hours"] is not None
        ]
    lines += in_part_finding(sorted({stage for cost in costs.values() for stage in cost.in_part}))
    missing = sorted({stage for cost in costs.values() for stage in cost.unrecorded})
    if missing:
        lines.append(f"No time is recorded for {', '.join(missing)}; the totals leave these stages out.")
    if any(cost.devices - {"cuda"} for cost in costs.values()):
        lines.append("Some of these runs used no GPU; their hours are not GPU hours.")
    return lines


def _tables(content: Mapping[str, Any], stages: Sequence[str]) -> Iterator[Table]:
    yield _by_stage(content, stages)
    parts = {name: found["hours_by_part"] for name, found in content["methods"].items()}
    names = list(dict.fromkeys(part for some in parts.values() for part in some))
    if names:
        rows = [[name, *(f"{some[p]:.3g}" if p in some else "" for p in names)] for name, some in parts.items()]
        yield Table("Hours by activity", ["hours", *names], rows)


def _by_stage(content: Mapping[str, Any], stages: Sequence[str]) -> Table:
    methods = content["methods"]
    timed = [stage for stage in stages if any(stage in found["hours"] for found in methods.values())]
    header = ["hours", *timed, "total"] + ["of PPO"] * bool(content["ppo_hours"])
    rows = []
    for name, found in methods.items():
        row = [name, *(f"{found['hours'][s]:.3g}" if s in found["hours"] else "" for s in timed)]
        total, share = found["total_hours"], found["share_of_ppo"]
        row.append("unknown" if total is None else f"{total:.3g}")
        rows.append(row + ["unknown" if share is None else f"{share:.1%}"] * bool(content["ppo_hours"]))
    return Table("Hours by stage", header, rows)
