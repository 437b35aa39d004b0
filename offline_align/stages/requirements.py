"""Checks of what each stage needs, made before a process group exists."""

import importlib.util
from typing import Any

from offline_align.config.compose import world_size
from offline_align.config.runs import EvaluateRun, ModelRun, Run, section
from offline_align.config.sections import (
    ConditionalMethodSection,
    LauncherKind,
    ModelSection,
    TrainerSection,
)
from offline_align.data.condition import check_format, check_quantile_format
from offline_align.distributed.launched import launched
from offline_align.errors import AlignError, ConfigError
from offline_align.launch import contradictions
from offline_align.stages.job import Job
from offline_align.stages.registry import Reads


def problems(job: Job[Any]) -> tuple[list[str], ModelSection | None]:
    """Return the problems of a job, and the architecture that will run, if it is known."""
    stage, config = job.stage, job.config
    found = _condition(config) + _nodes(job) + _overrides(config)
    if _waits_for_jobs(job):
        return found, None  # their files do not exist yet; the job checks again when it starts
    found += _files(job) + stage.problems(job)
    if not isinstance(config, ModelRun):
        return found, None
    if stage.starts_from is not None and config.init.from_ is None:
        return [*found, f"init.from is not set: give {stage.starts_from}"], None
    if config.dry_run and config.init.from_ is None:
        return found, config.model
    try:
        source = job.source
        source.renderer()  # raises if the chat template is missing or not valid Jinja
    except ConfigError as error:
        # The architecture in the configuration can still be checked, to report all problems.
        return found + error.problems, None if config.init.from_ else config.model
    return found + _kind(job, source.kind) + _wandb(config), source.model


def _files(job: Job[Any]) -> list[str]:
    config, key = job.config, job.stage.data_key
    missing = []
    if key is not None and config.named_files()[key] is None and not _data_is_optional(config):
        what = "training rows" if job.stage.recipe else "read"
        missing.append(f"{key} is not set: give the file or files {'of' if job.stage.recipe else 'to'} {what}")
    if missing and job.stage.reads is Reads.raw_rows:
        return missing
    try:
        _ = job.inputs, job.shown_runs
    except AlignError as error:
        missing += str(error).splitlines()
    return missing


def _data_is_optional(config: Run) -> bool:
    """Return whether data is optional: in a dry run of training, or a report without answers."""
    if isinstance(config, EvaluateRun):
        return not (config.judge.calibration is None and config.evaluate.runs is None)
    return config.dry_run and section(config, TrainerSection) is not None


def _nodes(job: Job[Any]) -> list[str]:
    launcher = job.launcher
    if launcher is None:
        return []
    if job.stage.one_process and world_size(launcher.nproc_per_node, launcher.nodes) > 1:
        name = job.stage.name
        return [f"launcher.nproc_per_node, launcher.nodes: `{name}` is one process; start one, and leave both at 1"]
    if launched() is not None:
        return contradictions(launcher)
    if launcher.nodes == 1 or launcher.kind is LauncherKind.slurm or job.config.dry_run:
        return []
    return [
        f"launcher.nodes={launcher.nodes}: this command starts the ranks of one machine; use launcher=slurm, "
        "or run torchrun on every node (dry_run=true prints the line)"
    ]


def _waits_for_jobs(job: Job[Any]) -> bool:
    """Return whether the run is submitted after jobs that write its inputs."""
    return job.launcher is not None and job.launcher.dependency is not None and launched() is None


def _overrides(config: Run) -> list[str]:
    """Return the overrides that megatron-core does not know; load it only if there are any."""
    model = section(config, ModelSection)
    if model is None or not model.overrides:
        return []
    from offline_align.model.build import unknown_overrides

    return unknown_overrides(model)


def _condition(config: Run) -> list[str]:
    """Return the problems of the text that Conditional Alignment writes into prompts."""
    method = section(config, ConditionalMethodSection)
    if method is None:
        return []
    found = []
    try:
        check_format(method.reward_format, method.reward_limit)
    except ConfigError as error:
        found += error.problems
    try:
        check_quantile_format(method.quantile_format)
    except ConfigError as error:
        found += error.problems
    return found


def _kind(job: Job[Any], kind: str) -> list[str]:
    source, stage = job.config.init.from_, job.stage
    if stage.needs is None or stage.needs == kind:
        return []
    if stage.needs == "reward_model":
        return [f"init.from={source}: is a policy; `{stage.name}` needs a reward model, trained by `reward`"]
    return [f"init.from={source}: is a reward model; `{stage.name}` needs a policy"]


def _wandb(config: Run) -> list[str]:
    trainer = section(config, TrainerSection)
    project = trainer.wandb_project if trainer else None
    if project is None or importlib.util.find_spec("wandb") is not None:
        return []
    return [f"trainer.wandb_project={project}: wandb is not installed; pip install '.[wandb]', or leave it unset"]
