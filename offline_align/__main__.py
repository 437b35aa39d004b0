"""`offline-align <stage> [key=value ...]`: one command line for every stage.

offline-align                      the stages
offline-align --version            the version
offline-align sft --help           the keys of a stage
offline-align sft model=demo data.train=rows.jsonl run.dir=runs/sft
torchrun --nproc-per-node=8 -m offline_align sft ...
"""

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline_align import __version__
from offline_align.config.compose import STAGES, compose, require, world_size
from offline_align.config.runs import GenerateRun, LabelRun, Run, TrainRun
from offline_align.distributed.leaving import leave
from offline_align.distributed.stopping import interruptible
from offline_align.errors import AlignError, ConfigError, StoppedEarly, StorageError, leave_for_launcher

_SUMMARIES = {
    "prepare": "raw data sets to rows: SFT and preference files, splits, a report",
    "sft": "supervised fine-tuning of a policy (Eq. 1)",
    "reward": "reward model on preference pairs (Eq. 2)",
    "label": "a reward model scores a data set (Figure 3)",
    "fa": "Filtering Alignment: rows above a reward threshold (Eq. 4)",
    "rwr": "Reward-Weighted Regression: rows weighted by exp(reward / beta) (Eq. 5)",
    "ca": "Conditional Alignment: the reward written into the prompt (Eq. 6)",
    "generate": "a policy answers prompts",
    "evaluate": "several sets of answers, a judge, tables and a page",
    "convert": "Hugging Face form to ours and back",
    "plan": "what FA would keep, RWR weigh and CA write: no GPU, no model",
    "verify": "whether a run folder is whole and where it came from",
}
_INTERNAL = 70
_LOG_FORM, _LOG_TIME = "%(asctime)s %(message)s", "%H:%M:%S"
# Their loops look at the limit themselves, once a step or batch is saved: each attempt gets on, however short it is.
_LISTENERS = (TrainRun, LabelRun, GenerateRun)


def main() -> None:
    """Run the command line of this process and exit with the code of its outcome."""
    leave(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code and prints errors as one line each, without a traceback."""
    debug = "debug=true" in arguments
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
    stage, *words = arguments
    if stage not in STAGES:
        raise ConfigError(f"{stage}: no such stage; there are {', '.join(STAGES)}")
    if "-h" in words or "--help" in words:
        from offline_align.config.reference import stage_help

        print(stage_help(stage, _SUMMARIES[stage]))
        return 0
    composed = compose(stage, words)
    _set_up_logging()
    module = importlib.import_module(f"offline_align.stages.{stage}")
    config = require(composed, _problems(stage, composed.config, composed.explicit))
    if not config.dry_run:
        from offline_align.stages.hub import with_files

        config, words = _with_template_date(with_files(config), composed.explicit, words)
    if _becomes_a_job(config):
        return _submit(stage, config, words)
    if isinstance(config, (TrainRun, LabelRun)):
        from offline_align.launch import set_cuda_environment

        set_cuda_environment(config.parallel)
    if not config.dry_run and _launch(stage, config):
        from offline_align.launch import run_ranks

        launcher: Any = getattr(config, "launcher", None)
        return run_ranks(launcher, stage, words)
    _keep_output(config)
    if not isinstance(config, _LISTENERS):
        limit(getattr(getattr(config, "trainer", None), "max_time", None))
    code: int = module.run(config, composed.explicit)
    return code


def _with_template_date(config: Run, explicit: frozenset[str], words: list[str]) -> tuple[Run, list[str]]:
    """Return the run with the day of its template, and its words, so that all ranks take the same."""
    if getattr(config, "data", None) is None:
        return config, words
    from offline_align.stages.template_date import with_template_date

    dated: Any = with_template_date(config, explicit)
    return dated, words if dated is config else [*words, f"data.template_date={dated.data.template_date}"]


def _problems(stage: str, config: Run, explicit: frozenset[str]) -> list[str]:
    """Return everything wrong with a configuration that can be known before a process group exists."""
    from offline_align.config import checks
    from offline_align.stages import requirements

    launcher: Any = getattr(config, "launcher", None)
    world = world_size(launcher.nproc_per_node, launcher.nodes) if launcher else 1
    found, model = requirements.problems(stage, config, explicit)
    return checks.problems(config, model, world) + found


def _launch(stage: str, config: Run) -> bool:
    """Whether ranks are to be started for a stage that is not finished yet."""
    from offline_align.launch import needs_launch
    from offline_align.stages import common

    launcher: Any = getattr(config, "launcher", None)
    if launcher is None or not needs_launch(launcher):
        return False
    return not common.is_finished(stage, config, common.key_of(stage, config))


def _becomes_a_job(config: Run) -> bool:
    """Whether the stage is for Slurm, and this is not one of its ranks."""
    from offline_align.config.sections import LauncherKind
    from offline_align.launch import under_torchrun

    launcher: Any = getattr(config, "launcher", None)
    return launcher is not None and launcher.kind is LauncherKind.slurm and not under_torchrun()


def _submit(stage: str, config: Run, words: list[str]) -> int:
    """Print the text of the job with `dry_run=true`, else submit it, unless the run is complete, and print its id."""
    from offline_align import launch_slurm
    from offline_align.stages import common

    launcher: Any = getattr(config, "launcher", None)
    text = launch_slurm.job_text(config, stage, words)
    if config.dry_run:
        print(text)
    elif launcher.dependency or not common.is_finished(stage, config, common.key_of(stage, config)):
        print(launch_slurm.submit(text, config.run.dir))
    return 0


def _overview() -> str:
    lines = [f"  {name:<9} {text}" for name, text in _SUMMARIES.items()]
    head = "offline-align <stage> [key=value ...]      offline-align <stage> --help shows its keys\n"
    return "\n".join([head, *lines])


def _keep_output(config: Run) -> None:
    """Under torchrun, let every rank write into its own file of the run folder; rank 0 is heard on the console too.

    In a Slurm job srun does it. Raises OSError.
    """
    if config.dry_run or "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return
    rank = int(os.environ["RANK"])
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
