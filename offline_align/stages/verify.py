"""`verify`: check the files of a run folder and of the runs and data behind it."""

from pathlib import Path

from rich.text import Text
from rich.tree import Tree

from offline_align.config.runs import VerifyRun
from offline_align.errors import ConfigError, StorageError
from offline_align.lineage import FileCheck, Status, Verification, verify
from offline_align.stages.job import Job
from offline_align.stages.output import show

_COLOURS = {Status.whole: "green", Status.damaged: "red", Status.changed: "yellow", Status.missing: "red"}


def run(job: Job[VerifyRun]) -> int:
    """Print the chain of runs with the state of each file; return 0 if all are whole.

    Raises ConfigError if the folder does not exist, StorageError if a file differs from its record.
    """
    run_dir = job.run_dir
    if not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir}: no such folder; give the run folder to verify")
    if job.config.dry_run:
        show(Text(f"would read every file of {run_dir} and of the runs it came from"))
        return 0
    report = verify(run_dir)
    show(render(report))
    problems = report.problems()
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StorageError(f"{problems[0]}{more}; restore it from a copy, or run the stage again")
    return 0


def render(report: Verification) -> Tree:
    """Return the chain as a tree: each run once, with its parents below it."""
    return _node(report, shown=set())


def _node(report: Verification, shown: set[Path]) -> Tree:
    label = Text.assemble((report.stage or "run", "bold"), f"  {_shown(report.run_dir)}  ", _status(report.status))
    if report.reason:
        label.append(f"  {report.reason}")
    tree = Tree(label)
    if report.run_dir in shown:
        label.append("  (its files: above)")
        return tree
    shown.add(report.run_dir)
    if report.outputs:
        tree.add(Text(f"{_count(report.outputs)} written"))
    for check in report.outputs:
        if check.status is not Status.whole:
            tree.add(_file("wrote", check))
    for check in report.inputs:
        tree.add(_file("read", check))
    for parent in report.parents:
        tree.add(_node(parent, shown))
    return tree


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _file(verb: str, check: FileCheck) -> Text:
    reason = f"  {check.reason}" if check.reason else ""
    return Text.assemble((f"{verb} ", "dim"), f"{check.path}  ", _status(check.status), reason)


def _count(checks: tuple[FileCheck, ...]) -> str:
    whole = sum(check.status is Status.whole for check in checks)
    noun = "file" if len(checks) == 1 else "files"
    return f"{len(checks)} {noun}" if whole == len(checks) else f"{whole} of {len(checks)} {noun} whole as"


def _status(status: Status) -> tuple[str, str]:
    return status.value, _COLOURS[status]
