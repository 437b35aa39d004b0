"""Continuing an unfinished run: which settings have changed, and whether they may.

`settings.jsonl` in the run folder has a line for the first attempt and one for every later attempt
with other settings. If weights are loaded, their folder decides the architecture: the line has the
values of the folder, and its weights are compared by their hash.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline_align.config.resume import is_of_weights, refused
from offline_align.errors import ConfigError, StorageError
from offline_align.lineage import CHANGES, RunSettings, finished_key, write_atomically
from offline_align.wording import counted

FILE_NAME = "settings.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunKey:
    """The keys of an unfinished run."""

    content: str
    """Content key of the current settings."""
    continuation: str
    """Key of the settings that may not change between attempts."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Changed settings, with the step after which they changed."""

    @property
    def finished(self) -> str:
        """The key for the manifest."""
        return finished_key(self.content, self.changes)

    @property
    def facts(self) -> dict[str, Any]:
        """The changes, for the `extra` of the manifest."""
        return {CHANGES: self.changes} if self.changes else {}


def begin_or_continue(run_dir: Path, settings: RunSettings, given: dict[str, Any]) -> RunKey:
    """Return the keys of a run that begins or continues, and record its settings.

    `given` are the settings with the names of files as the user wrote them, by dotted keys; the
    architecture and `template` are those of the model that is loaded. Raises ConfigError with a line for
    each setting that may not change, StorageError.
    """
    step = steps_done(run_dir)
    lines = _read(run_dir / FILE_NAME) if step is not None else []
    loads_weights = given.get("init.from") is not None
    now = {"settings": _decisive(_plain(settings.flat()), loads_weights), "given": _plain(given)}
    if lines:
        # Earlier versions also wrote the defaults of `model.*`, which had no effect.
        last = lines[-1] | {"settings": _decisive(lines[-1]["settings"], loads_weights)}
        changes = _changes(last, now, run_dir, step)
        if not changes:
            return _key(settings, lines)
        lines.append(now | {"after_step": step, "changes": changes})
    else:
        lines = [now]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(run_dir / FILE_NAME, content.encode())
    return _key(settings, lines)


def _key(settings: RunSettings, lines: list[dict[str, Any]]) -> RunKey:
    changes = [{"after_step": line["after_step"], **line["changes"]} for line in lines if "changes" in line]
    return RunKey(settings.key, settings.continuation, changes)


def _decisive(settings: dict[str, Any], loads_weights: bool) -> dict[str, Any]:
    """Return the settings without the keys that the folder of the weights decides."""
    return {key: value for key, value in settings.items() if not (loads_weights and is_of_weights(key))}


def _changes(last: dict[str, Any], now: dict[str, Any], run_dir: Path, step: int | None) -> dict[str, Any]:
    """Return the old and new value of each changed setting; ConfigError if one may not change."""
    before, after = last["settings"], now["settings"]
    wrong = refused(before, after)
    problems = [_problem(key, last["given"], now["given"], why) for key, why in sorted(wrong.items())]
    # Inputs and parents are left out, because the keys that name them are reported too.
    named = [line for key, line in zip(sorted(wrong), problems, strict=True) if key not in ("inputs", "parents")]
    length = after.get("trainer.max_steps")
    if step is not None and isinstance(length, int) and length < step:
        named.append(
            f"trainer.max_steps={length}: this run has done {counted(step, 'step')} already; give {step} or more"
        )
    if problems and not named:
        named = ["the files of data and models have other content than when this run began"]
    if named:
        raise ConfigError(
            [f"{line}; restore it to continue, or choose another folder than run.dir={run_dir}" for line in named]
        )
    found = {key: [before.get(key), after.get(key)] for key in sorted(before.keys() | after.keys())}
    found = {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    for key, (old, new) in found.items():
        logger.warning("%s=%s: was %s until now; the run continues with it after step %s", key, new, old, step)
    return found


def _problem(key: str, before: dict[str, Any], after: dict[str, Any], why: str) -> str:
    old, new = before.get(key), after.get(key)
    if old == new:
        return f"{key}={new}: has other content than when this run began"
    return f"{key}={new}: this run began with {old}" + (f" ({why})" if why else "")


def steps_done(run_dir: Path) -> int | None:
    """Return the step of the newest checkpoint, 0 if only a journal has results, otherwise None."""
    steps = [int(folder.name[5:]) for folder in run_dir.glob("checkpoints/step_*") if folder.name[5:].isdigit()]
    results = any(part.stat().st_size for part in run_dir.glob("journal/*/part_*.jsonl"))
    return max(steps, default=0 if results else None)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) and {"settings", "given"} <= line.keys() for line in lines):
            raise ValueError("not settings")
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); restore it, or choose another run.dir") from error
    return lines


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values after a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain
