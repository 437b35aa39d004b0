"""What the mains share: which files a run reads, whether it is finished, and its plan in words."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_align import lineage
from offline_align.config.compose import to_mapping
from offline_align.config.runs import ConvertRun, EvaluateRun, ModelRun, PrepareRun, Run
from offline_align.config.sections import JudgeKind, ModelSection
from offline_align.data.records import BadRows, input_paths
from offline_align.data.sources import input_sources
from offline_align.distributed.run_lock import run_lock
from offline_align.errors import ConfigError, StorageError
from offline_align.launch import under_torchrun
from offline_align.lineage import effort
from offline_align.model.description import find_model
from offline_align.stages.continuation import RunKey, begin_or_continue

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)
DATA_KEYS = ("train", "valid", "input")


def input_files(config: Run) -> list[Path]:
    """Return the data files that `config` names; raises ConfigError for those that are not there."""
    if isinstance(config, PrepareRun):  # whose inputs may also be names of data sets
        return [source.path for source in input_sources(config.data.input, "data.input") if source.path]
    data = getattr(config, "data", None)
    named = {k: getattr(data, k, None) for k in DATA_KEYS}
    named = {f"data.{k}": value for k, value in named.items()}
    if isinstance(config, EvaluateRun):
        named["judge.calibration"] = config.judge.calibration
    if isinstance(config, ConvertRun) and config.convert.evaluation is not None:
        named["convert.evaluation"] = str(Path(config.convert.evaluation) / "report.json")
    return [p for key, value in named.items() if value is not None for p in input_paths(value, key)]


def parent_models(config: Run) -> list[Path]:
    """Return the models that `config` builds on, as checkpoint or Hugging Face folders."""
    named = {"init.from": getattr(getattr(config, "init", None), "from_", None)}
    if isinstance(config, EvaluateRun) and needs_judge(config):
        if config.judge.kind is JudgeKind.reward_model:
            named["judge.model"] = config.judge.model
        named["judge.second_model"] = config.judge.second_model
    given = [(key, source) for key, source in named.items() if source is not None]
    return [find_model(source, key) for key, source in given]


def needs_judge(config: EvaluateRun) -> bool:
    """Whether there is anything to judge: answers, or pairs that people have judged."""
    return config.data.input is not None or config.judge.calibration is not None


def named_runs(config: Run) -> list[Path]:
    """Return the finished runs that `evaluate.runs` names, but for the run that shows them.

    Raises ConfigError for a name that stands for none.
    """
    if not isinstance(config, EvaluateRun) or config.evaluate.runs is None:
        return []
    given = config.evaluate.runs
    found: list[Path] = []
    for name in given if isinstance(given, list | tuple) else [given]:
        folder = Path(str(name))
        is_run = (folder / lineage.MANIFEST).is_file()
        runs = [folder] if is_run else sorted(path.parent for path in folder.glob(f"*/{lineage.MANIFEST}"))
        if not runs:
            raise ConfigError(f"evaluate.runs={name}: holds no finished run; give run folders, or a folder of them")
        found += runs
    own = Path(config.run.dir).resolve()
    return [path for path in dict.fromkeys(run.resolve() for run in found) if path != own]


def key_of(stage: str, config: Run) -> str:
    """Return the content key of a run: equal keys mean equal results."""
    return settings_of(stage, config).key


def settings_of(stage: str, config: Run) -> lineage.RunSettings:
    """Return all that determines what a run produces."""
    parents = [*parent_models(config), *named_runs(config)]
    return lineage.run_settings(stage, to_mapping(config), input_files(config), parents)


def is_finished(stage: str, config: Run, key: str) -> bool:
    """Whether the run folder holds this very run complete; says so. Raises ConfigError if it holds another."""
    done = lineage.completed(Path(config.run.dir), stage, key)
    if done:
        # Left where a run was killed between its manifest and its last line.
        shutil.rmtree(Path(config.run.dir) / "journal", ignore_errors=True)
        effort.forget(Path(config.run.dir))
        logger.info("%s: %s is complete", stage, config.run.dir)
    return done


def run_on_ranks(stage: str, config: ModelRun, body: "Callable[[Ranks, RunKey], None]") -> int:
    """Run `body(ranks, keys)` on all ranks unless the run is finished; returns the exit code 0.

    A process that torchrun did not start looks first, before it loads anything heavy.
    """
    if not under_torchrun() and is_finished(stage, config, key_of(stage, config)):
        return 0
    from offline_align.distributed.setup import session

    with contextlib.ExitStack() as held, session(config.parallel, config.run) as ranks:

        def look() -> RunKey | None:
            settings = settings_of(stage, config)
            if is_finished(stage, config, settings.key) or not held.enter_context(
                only_job(stage, config, settings.key, settings.continuation)
            ):
                return None
            return begin_or_continue(Path(config.run.dir), settings, lineage.flat(to_mapping(config)))

        key = ranks.from_main(look)
        if key is not None:
            body(ranks, key)
    return 0


@contextlib.contextmanager
def only_job(stage: str, config: Run, key: str, continuation: str | None = None) -> Iterator[bool]:
    """Hold the run folder, one rank for all; gives whether there is still work to do.

    What the attempt costs is recorded under the key `continuation`, or `key` where none can be continued.
    Raises ConfigError where another job has it.
    """
    run_dir = Path(config.run.dir)
    with run_lock(run_dir, stage):
        # Another job may have finished the run since this one looked.
        to_do = not is_finished(stage, config, key)
        broken = lineage.incomplete_outputs(run_dir, lineage.read_manifest(run_dir))
        if broken:
            logger.warning("%s: %s is missing or cut short and is made again", run_dir, ", ".join(broken))
        with effort.recorded(run_dir, continuation or key) if to_do else contextlib.nullcontext():
            yield to_do


def start_folder(config: Run, model: ModelSection | None = None) -> Path:
    """Make the run folder, write `config.yaml` into it and return it.

    `model` is the architecture that runs, where it came with the weights and not from the configuration.
    """
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Else the first figure of a user would leave a list of fonts in the home folder.
    os.environ.setdefault("MPLCONFIGDIR", str((run_dir / "cache" / "matplotlib").resolve()))
    own = {"model": to_mapping(replace(model, tokenizer=None))} if model is not None else {}
    lineage.write_config(run_dir, to_mapping(config) | own)
    return run_dir


def bad_rows(config: Any, writes: bool) -> BadRows:
    """Return the policy on bad rows, one for the whole run; only one rank writes the quarantine file.

    What an earlier attempt quarantined is removed: its data may have been mended since. Raises StorageError.
    """
    quarantine = Path(config.run.dir) / "quarantine.jsonl"
    if writes:
        try:
            quarantine.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{quarantine}: cannot be removed: {error.strerror or error}") from error
    return BadRows(config.data.on_bad_row, quarantine if writes else None)


def cache_dir(config: Any) -> Path:
    """Return the folder of tokenised data."""
    return Path(config.data.cache_dir) if config.data.cache_dir else Path(config.run.dir) / "cache"
