"""The first line of a command: what runs, where to, and from what, before anything heavy is imported."""

from typing import Any

from offline_align.config.runs import EvaluateRun, PlanRun, Run, VerifyRun, section
from offline_align.config.sections import JudgeKind, LauncherKind, LauncherSection
from offline_align.distributed.launched import launched
from offline_align.lineage import effort


def first_line(stage: str, config: Run) -> str | None:
    """Return one line about a command, such as `sft: run.dir=runs/sft, init.from=models/base, ...`.

    None for dry runs, for `plan` and `verify`, which are quick and print results, and for ranks that
    this program has started, because the command that started them has said it.
    """
    if config.dry_run or isinstance(config, PlanRun | VerifyRun) or effort.started_by_this_program():
        return None
    named: dict[str, Any] = {"run.dir": config.run.dir, **config.named_models(), **config.named_files()}
    if isinstance(config, EvaluateRun):
        named["judge"] = config.judge.kind if config.judges else None
        if config.judge.kind is not JudgeKind.reward_model:
            named["judge.model"] = config.judge.model
    given = [f"{key}={_shown(value)}" for key, value in named.items() if value is not None]
    return f"{stage}: {', '.join(given + _ranks(config))}"


def _shown(value: Any) -> str:
    """Return a path or a list of paths, shortened if there are many."""
    if not isinstance(value, list | tuple):
        return str(value)
    names = [*map(str, value[:3]), *([f"... ({len(value)} in all)"] if len(value) > 3 else [])]
    return f"[{', '.join(names)}]"


def _ranks(config: Run) -> list[str]:
    launcher, started = section(config, LauncherSection), launched()
    if started is not None:
        return [f"{started.world_size} ranks"] if started.world_size > 1 else []
    if launcher is None or launcher.nproc_per_node * launcher.nodes == 1:
        return []
    where = "in a Slurm job" if launcher.kind is LauncherKind.slurm else "on this machine"
    return [f"{launcher.nproc_per_node * launcher.nodes} ranks {where}"]
