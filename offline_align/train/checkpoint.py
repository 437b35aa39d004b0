"""Checkpoints: megatron's sharded form inside a folder that appears whole or not at all.

`checkpoints/step_XXXXXXXX/` holds the shards, `model.json`, `tokenizer/`, `state.json` and, written last,
`checkpoint.json` with the size and SHA-256 of every file (see `saving`). `latest` and `best` are links replaced in
one operation. All hashes are checked on all ranks before a single tensor is used; where the newest checkpoint of a
run is damaged, the one before it takes its place.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from offline_align.distributed.setup import Ranks
from offline_align.errors import FailedOnMainRank, StorageError
from offline_align.lineage import file_sha256
from offline_align.lineage.files import canonical_json, fsync_path, text_sha256
from offline_align.lineage.manifest import LONGEST_PATH
from offline_align.train import optimizer_state, safe_unpickling

FOLDER = "checkpoints"
FILES_NAME = "checkpoint.json"
STATE_NAME = "state.json"
_STEP_NAME = re.compile(r"step_\d{8}")

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands; with the weights and the moments, all that a continuation needs."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows seen, counted on through the epochs."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them were the last ones."""
    validation_due: bool = False
    """Whether the validation after the last step is still to be done: a stop request came before its end."""
    best_step: int | None = None
    """Step of the validation with the lowest finite loss so far; None without any."""
    best_value: float | None = None
    """Its loss."""
    seconds: float = 0.0
    """Time spent in the loop, over all attempts."""
    settings: str = ""
    """Key of the settings and data that the steps depend on."""

    def __post_init__(self) -> None:
        """Forget a best validation that is not finite: nothing is below NaN, and earlier versions saved such a one."""
        if self.best_value is not None and not math.isfinite(self.best_value):
            self.best_step = self.best_value = None


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_dir / FOLDER / f"step_{step:08d}"


def temporary(folder: Path, purpose: str = "tmp") -> Path:
    """Return an unused hidden name beside `folder`, which no run takes for a checkpoint."""
    return folder.with_name(f".{folder.name}.{purpose}-{uuid.uuid4().hex[:8]}")


def link(folder: Path, name: str) -> None:
    """Let `checkpoints/<name>` point to the checkpoint `folder`, in one operation."""
    path = folder.parent / name
    attempt = temporary(path)
    attempt.symlink_to(folder.name)
    attempt.replace(path)
    fsync_path(folder.parent)


def newest(run_dir: Path) -> Path | None:
    """Return the newest checkpoint folder of a run, whole or not, or None."""
    return max(_step_folders(run_dir), default=None)


def _step_folders(run_dir: Path) -> list[Path]:
    folder = run_dir / FOLDER
    return sorted(p for p in folder.iterdir() if _STEP_NAME.fullmatch(p.name)) if folder.is_dir() else []


def newest_whole(run_dir: Path, ranks: Ranks) -> Path | None:
    """Return the newest checkpoint of a run whose files all match their hashes; None for a run that has none yet.

    All ranks call it together and get the same. Damaged ones after it are set aside with a warning, and their steps
    are done again. Raises StorageError where there are checkpoints and none is whole: training from the start again
    would pass for a continuation.
    """
    damaged: dict[Path, list[str]] = {}
    whole: Path | None = None
    for folder in reversed(ranks.broadcast(_step_folders(run_dir))):
        names = damage(folder, ranks)
        if not names:
            whole = folder
            break
        damaged[folder] = names
    if whole is None:
        ranks.from_main(lambda: _check_nothing_lost(run_dir / FOLDER, damaged))
    elif damaged:
        ranks.from_main(lambda: _set_aside(damaged, whole))
    return whole


def _check_nothing_lost(folder: Path, damaged: dict[Path, list[str]]) -> None:
    """Raise StorageError where a run without a whole checkpoint has had one."""
    advice = f"restore one from a copy, or remove {folder} to train from the start"
    if damaged:
        told = "; ".join(f"{path.name}: {_shown(names)}" for path, names in damaged.items())
        raise StorageError(f"{folder}: no checkpoint is whole ({told}): {advice}")
    latest = folder / "latest"
    if latest.is_symlink():
        raise StorageError(f"{latest}: points to {latest.readlink()}, which is gone: {advice}")


def _set_aside(damaged: dict[Path, list[str]], whole: Path) -> None:
    """Hide damaged checkpoints, which are kept until their steps have been saved again, behind the `whole` one."""
    try:
        for folder, names in damaged.items():
            link(whole, "latest")
            aside = temporary(folder, "damaged")
            folder.rename(aside)
            fsync_path(folder.parent)
            logger.warning(
                "%s: DAMAGED (%s): set aside as %s; going back to %s", folder, _shown(names), aside.name, whole.name
            )
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be set aside: {error.strerror or error}") from error


def settle(run_dir: Path, state: TrainState, keep: int) -> None:
    """Let `latest` and `best` point where `state`, that of the newest whole checkpoint, says; delete what is old.

    What stays are the `keep` newest checkpoints and the best one. A kill at any point of this is made good by the
    next call. Without a best step there is no link `best`. Raises OSError where a link cannot be made; what cannot be
    deleted stays.
    """
    link(step_folder(run_dir, state.step), "latest")
    if state.best_step is None:
        (run_dir / FOLDER / "best").unlink(missing_ok=True)
    elif step_folder(run_dir, state.best_step).is_dir():
        link(step_folder(run_dir, state.best_step), "best")
    _prune(run_dir, state, keep)


def _prune(run_dir: Path, state: TrainState, keep: int) -> None:
    folders = _step_folders(run_dir)
    kept = {step_folder(run_dir, s) for s in (state.step, state.best_step) if s is not None}
    for path in set(folders[: -max(keep, 1)]) - kept:
        _delete(path)
    folder = run_dir / FOLDER
    again = [path for done in folders for path in folder.glob(f".{done.name}.damaged-*")]
    for leftover in (*folder.glob(".*.tmp-*"), *again):
        _remove(leftover)


def _delete(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half deleted one is never taken for one."""
    gone = temporary(folder)
    try:
        folder.rename(gone)
    except OSError as error:
        logger.warning("%s: cannot be deleted: %s", folder, error.strerror or error)
        return
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def manifest_text(files: dict[str, dict[str, Any]]) -> str:
    """Return the content of `checkpoint.json`: size and SHA-256 of every file, sealed by a hash of their own."""
    return json.dumps({"files": files, "sha256": text_sha256(canonical_json(files))}, indent=1) + "\n"


def entry(path: Path) -> dict[str, Any]:
    """Return what `checkpoint.json` says of a file. Raises OSError or StorageError."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def damage(folder: Path, ranks: Ranks) -> list[str]:
    """Return the names of files of a checkpoint that are missing or not as they were written, on all ranks alike."""
    expected = ranks.broadcast(_recorded(folder) if ranks.is_main else None)
    if expected is None:
        return [FILES_NAME]
    own = [n for n in sorted(expected)[ranks.rank :: ranks.world_size] if not _matches(folder / n, expected[n])]
    return sorted({n for part in ranks.gather(own) for n in part})


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Return what `checkpoint.json` says of each file, or None where it is missing or damaged itself."""
    try:
        recorded = json.loads((folder / FILES_NAME).read_bytes())
        files: dict[str, Any] = recorded["files"]
        # Earlier checkpoints have no seal.
        seal = text_sha256(canonical_json(files))
        named = recorded.keys() <= {"files", "sha256"}
        whole = named and recorded.get("sha256", seal) == seal and STATE_NAME in files
        whole = whole and all(_is_inside(name) and isinstance(files[name], dict) for name in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return files if whole else None


def _is_inside(name: str) -> bool:
    """Whether a name of the manifest, which may be anybody's, can be that of a file in its folder."""
    path = Path(name)
    return "\0" not in name and len(name) <= LONGEST_PATH and not path.is_absolute() and ".." not in path.parts


def _matches(path: Path, expected: dict[str, Any]) -> bool:
    try:
        return entry(path) == expected
    except (OSError, StorageError):
        return False


def verify(folder: Path, ranks: Ranks) -> None:
    """Check every file of a checkpoint against its hash; raises StorageError on all ranks alike."""
    names = damage(folder, ranks)
    if names:
        raise refusal(f"{folder}: damaged or missing: {_shown(names)}; take an earlier checkpoint", ranks)


def refusal(message: str, ranks: Ranks) -> StorageError | FailedOnMainRank:
    """Return the error that all ranks end with, and that one of them says."""
    return StorageError(message) if ranks.is_main else FailedOnMainRank(StorageError.exit_code)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def digest(folder: Path) -> str:
    """Return a hash of what a checkpoint is: weights, description and tokenizer, by the hashes of its files.

    Raises StorageError where its manifest is damaged.
    """
    files = _recorded(folder)
    if files is None:
        raise StorageError(f"{folder / FILES_NAME}: is not as it was written: take an earlier checkpoint")
    content = {n: e["sha256"] for n, e in files.items() if n != STATE_NAME}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> TrainState:
    """Return the state of a checkpoint. Raises StorageError where it is another program's, or a stranger's."""
    try:
        return TrainState(**json.loads((folder / STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{folder / STATE_NAME}: is not the state of a run: take an earlier checkpoint") from error


def sharded_weights(model: Any) -> dict[str, Any]:
    """Return megatron's description of the weights of a model, the same for every backend."""
    # Transformer Engine adds the history of delayed fp8 scales, which our recipe does not keep.
    return {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}


def load_weights(model: nn.Module, folder: Path, ranks: Ranks, fresh_prefixes: tuple[str, ...] = ()) -> None:
    """Load weights saved at any layout into `model`; parameters under `fresh_prefixes` keep their initial values.

    Raises StorageError on all ranks where a file is damaged.
    """
    verify(folder, ranks)
    wanted = {k: v for k, v in sharded_weights(model).items() if not k.startswith(fresh_prefixes or ("\0",))}
    _load_into(model, safe_unpickling.load(wanted, folder))


def load(model: nn.Module, optimizer: MegatronOptimizer, folder: Path) -> TrainState:
    """Load weights, moments and state of a checkpoint saved at any layout, which `newest_whole` has verified."""
    shards = sharded_weights(model)
    shards["optimizer"] = optimizer_state.to_load(optimizer, shards)
    loaded = safe_unpickling.load(shards, folder)
    optimizer_state.take(optimizer, loaded.pop("optimizer"))
    _load_into(model, loaded)
    return read_state(folder)


def _load_into(model: nn.Module, loaded: dict[str, Any]) -> None:
    names = {k for k, _ in model.named_parameters()}
    tensors = {k: v for k, v in loaded.items() if k in names and not isinstance(v, ShardedObject)}
    model.load_state_dict(tensors, strict=False)
