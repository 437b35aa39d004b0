"""The command line `offline-align <stage> [key=value ...]`, the same for every stage.

offline-align                      the stages
offline-align --version            the version
offline-align sft --help           the keys of a stage that people set
offline-align sft --help=all       all its keys
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
from typing import TYPE_CHECKING

from offline_align import __version__
from offline_align.config.compose import require, world_size
from offline_align.config.runs import Run, section
from offline_align.config.sections import LauncherKind, LauncherSection, LimitSection, ParallelSection
from offline_align.distributed.launched import Launcher, forget_leftovers, launched
from offline_align.distributed.stopping import interruptible
from offline_align.distributed.teardown import exit_process
from offline_align.errors import AlignError, ConfigError, StoppedEarly, StorageError, write_error_file
from offline_align.launch import needs_launch, run_ranks, set_cuda_environment, set_openmp_environment
from offline_align.lineage import effort
from offline_align.stages.first_line import first_line
from offline_align.stages.registry import STAGES
from offline_align.stages.template import fix_template

if TYPE_CHECKING:
    from offline_align.stages.job import Job

# Run as a module, this one is called `__main__`, which is no child of the package's logger.
logger = logging.getLogger("offline_align.main")
_INTERNAL = 70
_LOG_FORM, _LOG_TIME = "%(asctime)s %(message)s", "%H:%M:%S"


def main() -> None:
    """Run the command line of this process and exit with its exit code."""
    exit_process(run(sys.argv[1:], whole_process=True))


def run(arguments: list[str], whole_process: bool = False) -> int:
    """Run one command and return its exit code; print each error as one line, without a traceback.

    `whole_process` says that the process runs only this command, so the run's cost includes the
    start of the process.
    """
    debug = "debug=true" in arguments
    effort.begin(whole_process)
    try:
        with interruptible() as limit:
            return _dispatch(arguments, limit)
    except AlignError as error:
        if debug:
            traceback.print_exc()
        write_error_file(error.exit_code, str(error))
        for line in str(error).splitlines():
            # All ranks stop together, so only one of them reports it.
            if not isinstance(error, StoppedEarly):
                _print_error(line)
            elif os.environ.get("RANK", "0") == "0":
                _print_line(line)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has closed the pipe, as `head` does. That is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        message = f"{error.filename or 'storage'}: {error.strerror or error}"
        write_error_file(StorageError.exit_code, message)
        _print_error(message)
        return StorageError.exit_code
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # panics of Rust libraries are BaseExceptions; they too become one line
        if debug:
            traceback.print_exc()
        first_line = str(error).partition("\n")[0]
        message = f"internal error: {type(error).__name__}: {first_line}; debug=true shows where"
        write_error_file(_INTERNAL, message)
        _print_error(message)
        return _INTERNAL


def _print_error(line: str) -> None:
    _print_line(f"error: {line}")


def _print_line(line: str) -> None:
    rank = os.environ.get("RANK")
    prefix = f"offline-align[rank {rank}]" if rank is not None else "offline-align"
    print(f"{prefix}: {line}", file=sys.stderr, flush=True)


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
    if asked := {"-h", "--help", "--help=all"}.intersection(words):
        from offline_align.config.reference import stage_help

        print(stage_help(name, stage.schema, stage.summary, stage.required, whole="--help=all" in asked))
        return 0
    set_openmp_environment()
    composed = stage.compose(words)
    _set_up_logging()
    if launched() is None and (leftovers := forget_leftovers()):
        logger.info("no launcher has started this process; ignored: %s", leftovers)
    if not composed.problems and (line := first_line(name, composed.config)):
        logger.info("%s", line)
    from offline_align.stages.job import Job

    job = Job(stage, composed.config, composed.explicit)
    fix_template(job)
    require(composed, _problems(job))
    if not job.config.dry_run:
        from offline_align.stages.hub import fetch_data_sets

        fetch_data_sets(job)
        words = _with_template_date(job, words)
    return _run(job, words, limit)


def _run(job: "Job[Run]", words: list[str], limit: Callable[[str | None], None]) -> int:
    """Submit the job, start its ranks, or run the stage in this process; return the exit code."""
    launcher, config = job.launcher, job.config
    if launcher is not None and _becomes_a_batch_job(launcher):
        return _submit(job, launcher, words)
    parallel = section(config, ParallelSection)
    if job.stage.runs_megatron and parallel is not None:
        set_cuda_environment(parallel)
    if launcher is not None and not config.dry_run and needs_launch(launcher):
        return 0 if job.is_finished() else run_ranks(launcher, job.stage.name, words)
    _log_to_files(config)
    trainer = section(config, LimitSection)
    if not job.stage.watches_the_clock:
        limit(trainer.max_time if trainer else None)
    return job.stage.run(job)


def _with_template_date(job: "Job[Run]", words: list[str]) -> list[str]:
    """Fix the day that the template writes; returns the words of the command with it, for all ranks."""
    from offline_align.stages.template_date import fix_template_date

    day = fix_template_date(job)
    return words if day is None else [*words, f"data.template_date={day}"]


def _problems(job: "Job[Run]") -> list[str]:
    """Return all problems of a configuration that can be found before a process group exists."""
    from offline_align.config import checks
    from offline_align.stages import requirements

    launcher = job.launcher
    world = world_size(launcher.nproc_per_node, launcher.nodes) if launcher else 1
    found, model = requirements.problems(job)
    return checks.problems(job.config, model, world) + found


def _becomes_a_batch_job(launcher: LauncherSection) -> bool:
    """Return whether the stage is to be submitted to Slurm, because this is not one of its ranks."""
    return launcher.kind is LauncherKind.slurm and launched() is None


def _submit(job: "Job[Run]", launcher: LauncherSection, words: list[str]) -> int:
    """Submit the batch job unless the run is complete; with `dry_run=true`, only print it."""
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


def _log_to_files(config: Run) -> None:
    """Under torchrun, make every rank write to its own log file, and rank 0 to the console too.

    In a Slurm job srun does this. Raises OSError.
    """
    started = launched()
    if config.dry_run or started is None or started.launcher is not Launcher.torchrun or started.world_size == 1:
        return
    rank = started.rank
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
    # Other libraries warn about missing optional packages at every import. We report them once.
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\..*|transformers\..*")
    warnings.simplefilter("ignore", SyntaxWarning)
    for noisy in ("megatron", "torch", "torch.utils.cpp_extension", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
