"""`offline-align <stage> [key=value ...]`: one command line for every stage.

offline-align                      the stages
offline-align --version            the version
offline-align sft --help           the keys of a stage
offline-align sft model=demo data.train=rows.jsonl run.dir=runs/sft
torchrun --nproc-per-node=8 -m offline_align sft ...
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from offline_align import __version__
from offline_align.config.compose import require, world_size
from offline_align.config.runs import Run, section
from offline_align.config.sections import LauncherKind, LauncherSection, LimitSection, ParallelSection
from offline_align.distributed.launched import Launcher, forget_leftovers, launched
from offline_align.distributed.stopping import interruptible
from offline_align.distributed.teardown import exit_process
from offline_align.errors import AlignError, ConfigError, StoppedEarly, StorageError, leave_for_launcher
from offline_align.launch import needs_launch, run_ranks, set_cuda_environment, set_openmp_environment
from offline_align.lineage import effort
from offline_align.stages.job import Job
from offline_align.stages.registry import STAGES

_INTERNAL = 70
_LOG_FORM, _LOG_TIME = "%(asctime)s %(message)s", "%H:%M:%S"


def main() -> None:
    """Run the command line of this process and exit with the code of its outcome."""
    exit_process(run(sys.argv[1:], whole_process=True))


def run(arguments: list[str], whole_process: bool = False) -> int:
    """Run one command; returns the exit code and prints errors as one line each, without a traceback.

    `whole_process`: the process is there for this command alone, so that its start belongs to what the run costs.
    """
    debug = "debug=true" in arguments
    effort.begin(whole_process)
    try:
        with interruptible() as limit:
            return _dispatch(arguments, limit)
    except AlignError as error:
        if debug:
            traceback.print_exc()
        leave_for_launcher(error.exit_code, str(error))
        # All ranks stop together, so one of them says it.
        if not isinstance(error, StoppedEarly) or os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                _say(line)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has left, as `head` does; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        message = f"{error.filename or 'storage'}: {error.strerror or error}"
        leave_for_launcher(StorageError.exit_code, message)
        _say(message)
        return StorageError.exit_code
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # the last resort, panics of Rust libraries too: a user is owed one line
        if debug:
            traceback.print_exc()
        first_line = str(error).partition("\n")[0]
        message = f"internal error: {type(error).__name__}: {first_line}; debug=true shows where"
        leave_for_launcher(_INTERNAL, message)
        _say(message)
        return _INTERNAL


def _say(line: str) -> None:
    rank = os.environ.get("RANK")
    prefix = f"offline-align[rank {rank}]" if rank is not None else "offline-align"
    print(f"{prefix}: error: {line}", file=sys.stderr, flush=True)


def _dispatch(arguments: list[str], limit: Callable[[str | None], None]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"offline-align {__version__}")
        return 0
    name, *words = arguments
    if name not in STAGES:
        raise ConfigError(f"{name}: no such stage; there are {', '.join(STAGES)}")
    stage = STAGES[name]
    if "-h" in words or "--help" in words:
        from offline_align.config.reference import stage_help

        print(stage_help(name, stage.schema, stage.summary))
        return 0
    set_openmp_environment()
    composed = stage.compose(words)
    _set_up_logging()
    if launched() is None and (leftovers := forget_leftovers()):
        logging.getLogger(__name__).info("no launcher has started this process; not used: %s", leftovers)
    job = Job(stage, composed.config, composed.explicit)
    require(composed, _problems(job))
    if not job.config.dry_run:
        from offline_align.stages.hub import fetch_data_sets

        fetch_data_sets(job)
        words = _with_template_date(job, words)
    return _run(job, words, limit)


def _run(job: Job[Run], words: list[str], limit: Callable[[str | None], None]) -> int:
    """Submit the job, start its ranks, or do its work here; returns the exit code."""
    launcher, config = job.launcher, job.config
    if launcher is not None and _becomes_a_batch_job(launcher):
        return _submit(job, launcher, words)
    parallel = section(config, ParallelSection)
    if job.stage.runs_megatron and parallel is not None:
        set_cuda_environment(parallel)
    if launcher is not None and not config.dry_run and needs_launch(launcher):
        return 0 if job.is_finished() else run_ranks(launcher, job.stage.name, words)
    _keep_output(config)
    trainer = section(config, LimitSection)
    if not job.stage.watches_the_clock:
        limit(trainer.max_time if trainer else None)
    return job.stage.run(job)


def _with_template_date(job: Job[Run], words: list[str]) -> list[str]:
    """Fix the day that the template writes; returns the words of the command with it, for all ranks."""
    from offline_align.stages.template_date import fix_template_date

    day = fix_template_date(job)
    return words if day is None else [*words, f"data.template_date={day}"]


def _problems(job: Job[Run]) -> list[str]:
    """Return everything wrong with a configuration that can be known before a process group exists."""
    from offline_align.config import checks
    from offline_align.stages import requirements

    launcher = job.launcher
    world = world_size(launcher.nproc_per_node, launcher.nodes) if launcher else 1
    found, model = requirements.problems(job)
    return checks.problems(job.config, model, world) + found


def _becomes_a_batch_job(launcher: LauncherSection) -> bool:
    """Whether the stage is for Slurm, and this is not one of its ranks."""
    return launcher.kind is LauncherKind.slurm and launched() is None


def _submit(job: Job[Run], launcher: LauncherSection, words: list[str]) -> int:
    """Print the text of the batch job with `dry_run=true`, else submit it, unless the run is complete."""
    from offline_align import launch_slurm

    text = launch_slurm.job_text(job.config, job.stage.name, words, on_gpus=not job.stage.one_process)
    if job.config.dry_run:
        print(text)
    elif launcher.dependency or not job.is_finished():
        print(launch_slurm.submit(text, job.config.run.dir))
    return 0


def _overview() -> str:
    lines = [f"  {stage.name:<9} {stage.summary}" for stage in STAGES.values()]
    head = "offline-align <stage> [key=value ...]      offline-align <stage> --help shows its keys\n"
    return "\n".join([head, *lines])


def _keep_output(config: Run) -> None:
    """Under torchrun, let every rank write into its own file of the run folder; rank 0 is heard on the console too.

    In a Slurm job srun does it. Raises OSError.
    """
    place = launched()
    if config.dry_run or place is None or place.launcher is not Launcher.torchrun or place.world_size == 1:
        return
    rank = place.rank
    path = Path(config.run.dir) / "logs" / f"rank_{rank:03d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter(_LOG_FORM, _LOG_TIME))
        logging.getLogger().addHandler(handler)
        return
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    logging.getLogger("offline_align").setLevel(logging.INFO)


def _set_up_logging() -> None:
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format=_LOG_FORM, datefmt=_LOG_TIME)
    logging.getLogger("offline_align").setLevel(level)
    # Missing optional packages are said once by us, not at every import by others.
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\..*|transformers\..*")
    warnings.simplefilter("ignore", SyntaxWarning)
    for noisy in ("megatron", "torch", "torch.utils.cpp_extension", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
