"""What each stage needs to be given, checked before a process group exists."""

import importlib.util
from typing import Any

from offline_align.config.runs import EvaluateRun, ModelRun, PrepareRun, Run, TrainRun
from offline_align.config.sections import ConditionalMethodSection, JudgeKind, LauncherKind, ModelSection
from offline_align.errors import AlignError, ConfigError
from offline_align.launch import under_torchrun
from offline_align.stages import common
from offline_align.stages.origin import resolve

# Stages that cannot start from random weights.
_NEEDS_WEIGHTS = {
    "label": "a reward model",
    "generate": "a policy",
    "convert": "a Hugging Face folder, or a policy or reward model of ours",
}
_NEEDS_INPUT = {"prepare", "label", "generate", "evaluate", "plan"}


def problems(stage: str, config: Run, explicit: frozenset[str]) -> tuple[list[str], ModelSection | None]:
    """Return what `stage` misses, and the architecture that will run where it is known."""
    found = _condition(config) + _nodes(config) + _overrides(config)
    if _awaits_jobs(config):
        return found, None  # their files are not there yet; the job looks again when it starts
    found += _files(stage, config)
    if not isinstance(config, ModelRun):
        return found + _judge(config), None
    if stage in _NEEDS_WEIGHTS and config.init.from_ is None:
        return [*found, f"init.from is not set: give {_NEEDS_WEIGHTS[stage]}"], None
    if config.dry_run and config.init.from_ is None:
        return found, config.model
    try:
        origin = resolve(config, explicit)
        origin.renderer()  # refuses a chat template that is not there or not Jinja
    except ConfigError as error:
        # The architecture as given can still be checked beside what is wrong with the rest.
        return found + error.problems, None if config.init.from_ else config.model
    return found + _kind(stage, config, origin.kind) + _wandb(config), origin.model


def _files(stage: str, config: Run) -> list[str]:
    data: Any = getattr(config, "data", None)
    missing = []
    if isinstance(config, TrainRun) and data.train is None and not config.dry_run:
        missing.append("data.train is not set: give the file or files of training rows")
    if stage in _NEEDS_INPUT and data.input is None and not _compares_nothing(config):
        missing.append("data.input is not set: give the file or files to read")
    if stage == "prepare":
        return missing
    try:
        common.input_files(config)
        common.named_runs(config)
    except AlignError as error:
        missing += str(error).splitlines()
    return missing


def _compares_nothing(config: Run) -> bool:
    """Whether `evaluate` has another task than to compare answers."""
    return isinstance(config, EvaluateRun) and not (config.judge.calibration is None and config.evaluate.runs is None)


def _nodes(config: Run) -> list[str]:
    launcher: Any = getattr(config, "launcher", None)
    if launcher is None or under_torchrun():
        return []
    if isinstance(config, PrepareRun) and launcher.nodes * launcher.nproc_per_node > 1:
        return ["launcher.nproc_per_node, launcher.nodes: `prepare` is one process; leave both at 1"]
    if launcher.nodes == 1 or launcher.kind is LauncherKind.slurm or config.dry_run:
        return []
    return [
        f"launcher.nodes={launcher.nodes}: this command starts the ranks of one machine; use launcher=slurm, "
        "or run torchrun on every node (dry_run=true prints the line)"
    ]


def _awaits_jobs(config: Run) -> bool:
    """Whether the run is submitted behind jobs that write what it reads."""
    launcher: Any = getattr(config, "launcher", None)
    return launcher is not None and launcher.dependency is not None and not under_torchrun()


def _overrides(config: Run) -> list[str]:
    """Return what megatron-core's configuration does not know; only then is it worth loading."""
    if not isinstance(config, ModelRun) or not config.model.overrides:
        return []
    from offline_align.model.build import unknown_overrides

    return unknown_overrides(config.model)


def _condition(config: Run) -> list[str]:
    """Return what is wrong with the text that Conditional Alignment writes into prompts."""
    method: Any = getattr(config, "method", None)
    if not isinstance(method, ConditionalMethodSection):
        return []
    from offline_align.methods.ca import check_format

    try:
        check_format(method.reward_format, method.reward_limit)
    except ConfigError as error:
        return error.problems
    return []


def _kind(stage: str, config: ModelRun, kind: str) -> list[str]:
    source = config.init.from_
    if stage == "label" and kind != "reward_model":
        return [f"init.from={source}: is a policy; `label` needs a reward model, trained by `reward`"]
    if stage not in ("label", "reward", "convert") and kind == "reward_model":
        return [f"init.from={source}: is a reward model; `{stage}` needs a policy"]
    return []


def _wandb(config: ModelRun) -> list[str]:
    project = config.trainer.wandb_project if isinstance(config, TrainRun) else None
    if project is None or importlib.util.find_spec("wandb") is not None:
        return []
    return [f"trainer.wandb_project={project}: wandb is missing; pip install '.[wandb]', or leave it unset"]


def _judge(config: Run) -> list[str]:
    if not isinstance(config, EvaluateRun) or config.judge.kind is not JudgeKind.reward_model:
        return []
    if config.evaluate.runs is not None and not common.needs_judge(config):
        return []
    if config.judge.model is None:
        return ["judge.model is not set: give the run folder of a reward model"]
    from offline_align.evaluate.judges.reward_model import describe_reward_model

    given = config.data.template
    try:
        _, judge = describe_reward_model(config.judge.model, "judge.model", given)
    except ConfigError as error:
        return error.problems
    if given is not None and given is not judge.template:
        return [f"data.template={given}: judge.model was trained with {judge.template}; leave data.template unset"]
    return []
