"""What was run? Steps, final metrics and cost of every run that the report lists."""

from collections.abc import Mapping, Sequence
from typing import Any

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate.ancestry import Ancestor, Curve, read_curves
from offline_align.evaluate.parts.cost import in_part_finding, run_hours
from offline_align.evaluate.sections import Section, Table
from offline_align.lineage.effort import is_whole

NOTE = (
    "The named runs and all their ancestors. Training metrics are means over the last tenth of the logged steps; "
    "validation metrics are the last ones logged. Hours are wall-clock hours of whole commands times ranks, over all "
    "attempts, from each run's manifest."
)
LAST = 0.1


def runs_section(runs: Sequence[Ancestor], settings: EvaluateSection) -> Section:
    """Return one row per run, and the total hours."""
    found = {_name(run, runs): _describe(run) for run in runs}
    hours = [one["hours"] for one in found.values() if one["hours"] is not None]
    content = {"runs": found, "total_hours": sum(hours) if hours else None}
    return Section("runs", "What was run?", NOTE, _findings(content, settings.ppo_hours), content, [_table(found)])


def _name(run: Ancestor, runs: Sequence[Ancestor]) -> str:
    """Return the folder's name, with its parent's name in front if two runs share it."""
    shared = sum(other.title == run.title for other in runs) > 1
    return f"{run.run_dir.parent.name}/{run.title}" if shared else run.title


def _describe(run: Ancestor) -> dict[str, Any]:
    extra = run.manifest.extra
    curves = {curve.quantity: curve for curve in read_curves(run)}
    return {
        "stage": run.stage,
        "steps": extra.get("steps"),
        **{name: _last(curves.get(name)) for name in ("loss", "accuracy")},
        **{f"valid_{name}": _last_valid(curves.get(name)) for name in ("loss", "accuracy")},
        "hours": run_hours(extra),
        "hours_in_part": run_hours(extra) is not None and not is_whole(extra),
        "ranks": extra.get("ranks"),
        "device": extra.get("device"),
    }


def _last(curve: Curve | None) -> float | None:
    if curve is None:
        return None
    values = [value for _, value in curve.training[-max(1, round(LAST * len(curve.training))) :]]
    return sum(values) / len(values)


def _last_valid(curve: Curve | None) -> float | None:
    return curve.validation[-1][1] if curve is not None and curve.validation else None


def _findings(content: Mapping[str, Any], ppo_hours: float | None) -> list[str]:
    total, unrecorded = content["total_hours"], [k for k, one in content["runs"].items() if one["hours"] is None]
    lines = []
    if total is not None:
        share = f", {total / ppo_hours:.1%} of PPO's {ppo_hours:g}" if ppo_hours else ""
        lines.append(f"{total:.3g} hours in total{share}.")
    lines += in_part_finding(name for name, one in content["runs"].items() if one["hours_in_part"])
    if unrecorded:
        lines.append(f"No time is recorded for {', '.join(unrecorded)}.")
    return lines


def _table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    names = {
        "stage": "stage",
        "steps": "steps",
        "loss": "loss",
        "valid_loss": "validation loss",
        "accuracy": "accuracy",
        "valid_accuracy": "validation accuracy",
        "hours": "hours",
        "ranks": "ranks",
        "device": "device",
    }
    used = [key for key in names if any(one[key] is not None for one in found.values())]
    rows = [[name, *(_cell(one[key]) for key in used)] for name, one in found.items()]
    return Table("Runs", ["run", *(names[key] for key in used)], rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
