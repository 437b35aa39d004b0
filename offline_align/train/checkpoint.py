"""Checkpoints: megatron's sharded format, in a folder that appears in one atomic rename.

`checkpoints/step_XXXXXXXX/` holds the shards, `model.json`, `tokenizer/`, `state.json` and
`checkpoint.json`, which is written last and has the size and SHA-256 of every file (see `saving`).
`latest` and `best` are symbolic links that are replaced atomically. The ranks verify all hashes
before any tensor is used. If the newest checkpoint of a run is damaged, the previous one is used.
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
    """Progress of a run. Weights, optimizer state and this are all that resuming needs."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows trained on, over all epochs."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of the last steps were skipped without one that was applied."""
    validation_due: bool = False
    """Whether the validation after the last step is still to be done after a stop request."""
    best_step: int | None = None
    """Step with the lowest finite validation loss so far; None before the first one."""
    best_value: float | None = None
    """Validation loss of `best_step`."""
    seconds: float = 0.0
    """Time spent in the loop, over all attempts."""
    settings: str = ""
    """Hash of the settings and data that the steps depend on."""

    def __post_init__(self) -> None:
        """Drop a best loss that is not finite.

        No loss compares below NaN, and earlier versions could save one as the best.
        """
        if self.best_value is not None and not math.isfinite(self.best_value):
            self.best_step = self.best_value = None


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_dir / FOLDER / f"step_{step:08d}"


def temporary(folder: Path, purpose: str = "tmp") -> Path:
    """Return an unused hidden path beside `folder`, which no run mistakes for a checkpoint."""
    return folder.with_name(f".{folder.name}.{purpose}-{uuid.uuid4().hex[:8]}")


def link(folder: Path, name: str) -> None:
    """Point the link `checkpoints/<name>` to the checkpoint `folder` atomically."""
    path = folder.parent / name
    attempt = temporary(path)
    attempt.symlink_to(folder.name)
    attempt.replace(path)
    fsync_path(folder.parent)


def newest(run_dir: Path) -> Path | None:
    """Return the newest checkpoint folder of a run, intact or not, or None."""
    return max(step_folders(run_dir), default=None)


def step_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, intact or not, oldest first."""
    folder = run_dir / FOLDER
    return sorted(p for p in folder.iterdir() if _STEP_NAME.fullmatch(p.name)) if folder.is_dir() else []


def newest_whole(run_dir: Path, ranks: Ranks) -> Path | None:
    """Return the newest intact checkpoint of a run, or None if the run has no checkpoint yet.

    A checkpoint is intact if all of its files match their hashes. All ranks must call this together,
    and get the same result. Newer, damaged checkpoints are renamed with a warning, and their steps
    are repeated. Raises StorageError if there are checkpoints and none is intact: otherwise a run
    that starts over would look like one that resumes.
    """
    damaged: dict[Path, list[str]] = {}
    whole: Path | None = None
    for folder in reversed(ranks.broadcast(step_folders(run_dir))):
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
    """Raise StorageError if a run without an intact checkpoint has saved one before."""
    advice = f"restore one from a copy, or remove {folder} to train from the start"
    if damaged:
        told = "; ".join(f"{path.name}: {_shown(names)}" for path, names in damaged.items())
        raise StorageError(f"{folder}: no checkpoint is whole ({told}): {advice}")
    latest = folder / "latest"
    if latest.is_symlink():
        raise StorageError(f"{latest}: points to {latest.readlink()}, which is gone: {advice}")


def _set_aside(damaged: dict[Path, list[str]], whole: Path) -> None:
    """Rename damaged checkpoints to hidden names and point `latest` to the intact one.

    They are kept until their steps have been saved again.
    """
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


def update_links_and_prune(run_dir: Path, state: TrainState, keep: int) -> None:
    """Set the links `latest` and `best`, and delete old checkpoints.

    `state` is the state of the newest intact checkpoint. The `keep` newest checkpoints and the best
    one are kept. Without a best step, the link `best` is removed. If the process is killed anywhere
    in between, the next call completes the work. Raises OSError if a link cannot be set; a checkpoint
    that cannot be deleted is left in place.
    """
    link(step_folder(run_dir, state.step), "latest")
    if state.best_step is None:
        (run_dir / FOLDER / "best").unlink(missing_ok=True)
    elif step_folder(run_dir, state.best_step).is_dir():
        link(step_folder(run_dir, state.best_step), "best")
    _prune(run_dir, state, keep)


def _prune(run_dir: Path, state: TrainState, keep: int) -> None:
    folders = step_folders(run_dir)
    kept = {step_folder(run_dir, s) for s in (state.step, state.best_step) if s is not None}
    for path in set(folders[: -max(keep, 1)]) - kept:
        delete(path)
    folder = run_dir / FOLDER
    again = [path for done in folders for path in folder.glob(f".{done.name}.damaged-*")]
    for leftover in (*folder.glob(".*.tmp-*"), *again):
        _remove(leftover)


def delete(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted one is never used."""
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
    """Return the content of `checkpoint.json`: size and SHA-256 of every file, and a hash of that table."""
    return json.dumps({"files": files, "sha256": text_sha256(canonical_json(files))}, indent=1) + "\n"


def entry(path: Path) -> dict[str, Any]:
    """Return the entry of a file in `checkpoint.json`. Raises OSError or StorageError."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def damage(folder: Path, ranks: Ranks) -> list[str]:
    """Return the names of the files of a checkpoint that are missing or changed, equal on all ranks.

    Each rank hashes its share of the files.
    """
    expected = ranks.broadcast(_read_manifest(folder) if ranks.is_main else None)
    if expected is None:
        return [FILES_NAME]
    own = [n for n in sorted(expected)[ranks.rank :: ranks.world_size] if not _matches(folder / n, expected[n])]
    return sorted({n for part in ranks.gather(own) for n in part})


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the entries of `checkpoint.json` by file name, or None if it is missing or damaged."""
    try:
        recorded = json.loads((folder / FILES_NAME).read_bytes())
        files: dict[str, Any] = recorded["files"]
        digest_of_files = text_sha256(canonical_json(files))
        keys_are_known = recorded.keys() <= {"files", "sha256"}
        # Checkpoints of earlier versions have no hash of the table.
        whole = keys_are_known and recorded.get("sha256", digest_of_files) == digest_of_files and STATE_NAME in files
        whole = whole and all(_is_inside(name) and isinstance(files[name], dict) for name in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return files if whole else None


def _is_inside(name: str) -> bool:
    """Return whether a file name of the manifest, which is not trusted, stays inside its folder."""
    path = Path(name)
    return "\0" not in name and len(name) <= LONGEST_PATH and not path.is_absolute() and ".." not in path.parts


def _matches(path: Path, expected: dict[str, Any]) -> bool:
    try:
        return entry(path) == expected
    except (OSError, StorageError):
        return False


def verify(folder: Path, ranks: Ranks) -> None:
    """Check every file of a checkpoint against its hash. Raises StorageError on all ranks."""
    names = damage(folder, ranks)
    if names:
        raise error_for_all_ranks(f"{folder}: damaged or missing: {_shown(names)}; take an earlier checkpoint", ranks)


def error_for_all_ranks(message: str, ranks: Ranks) -> StorageError | FailedOnMainRank:
    """Return the error that each rank is to raise. Only rank 0 reports the message."""
    return StorageError(message) if ranks.is_main else FailedOnMainRank(StorageError.exit_code)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def digest(folder: Path) -> str:
    """Return a hash of the model in a checkpoint: its weights, description and tokenizer.

    It is computed from the recorded hashes of the files. Raises StorageError if the manifest is damaged.
    """
    files = _read_manifest(folder)
    if files is None:
        raise StorageError(f"{folder / FILES_NAME}: is not as it was written: take an earlier checkpoint")
    content = {n: e["sha256"] for n, e in files.items() if n != STATE_NAME}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> TrainState:
    """Return the state of a checkpoint. Raises StorageError if the file has another form."""
    try:
        return TrainState(**json.loads((folder / STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{folder / STATE_NAME}: is not the state of a run: take an earlier checkpoint") from error


def sharded_weights(model: Any) -> dict[str, Any]:
    """Return megatron's sharded state dict of the weights of a model, the same for every backend."""
    # Transformer Engine's extra state is the history of delayed fp8 scaling, which is not used here.
    return {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}


def load_weights(model: nn.Module, folder: Path, ranks: Ranks, fresh_prefixes: tuple[str, ...] = ()) -> None:
    """Load weights into `model` from a checkpoint that was saved at any parallel layout.

    Parameters whose names begin with one of `fresh_prefixes` keep their initial values. Raises
    StorageError on all ranks if a file is damaged.
    """
    verify(folder, ranks)
    wanted = {k: v for k, v in sharded_weights(model).items() if not k.startswith(fresh_prefixes or ("\0",))}
    _load_into(model, safe_unpickling.load(wanted, folder))


def load(model: nn.Module, optimizer: MegatronOptimizer, folder: Path) -> TrainState:
    """Load weights and optimizer state of a checkpoint, and return its training state.

    The checkpoint may have been saved at any parallel layout. The caller has verified its files with
    `newest_whole`.
    """
    shards = sharded_weights(model)
    shards["optimizer"] = optimizer_state.to_load(optimizer, shards)
    loaded = safe_unpickling.load(shards, folder)
    optimizer_state.load_state(optimizer, loaded.pop("optimizer"))
    _load_into(model, loaded)
    return read_state(folder)


def _load_into(model: nn.Module, loaded: dict[str, Any]) -> None:
    names = {k for k, _ in model.named_parameters()}
    tensors = {k: v for k, v in loaded.items() if k in names and not isinstance(v, ShardedObject)}
    model.load_state_dict(tensors, strict=False)
