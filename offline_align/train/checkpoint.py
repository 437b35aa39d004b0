"""Checkpoints: megatron's sharded form inside a folder that appears whole or not at all.

`checkpoints/step_XXXXXXXX/` holds the shards, `model.json`, `tokenizer/`, `state.json` and, written last,
`checkpoint.json` with the size and SHA-256 of every file. A save goes to a temporary folder that is renamed when all
of it is on disk; `latest` and `best` are links replaced in one operation. A load checks all hashes on all ranks
before a single tensor is used.
"""

import hashlib
import json
import queue
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from offline_align.data.tokenizer import Tokenizer
from offline_align.distributed.setup import Ranks
from offline_align.errors import StorageError
from offline_align.lineage import file_sha256
from offline_align.lineage.files import fsync_path
from offline_align.model.description import ModelDescription
from offline_align.train import reading

FOLDER = "checkpoints"
FILES_NAME = "checkpoint.json"
STATE_NAME = "state.json"
_OPTIMIZER_FORM = {"distrib_optim_sharding_type": "fully_reshardable"}
_STEP_NAME = re.compile(r"step_\d{8}")


@dataclass
class TrainState:
    """Where a run stands; with the weights and the moments, all that a continuation needs."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Rows seen, counted on through the epochs."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    best_step: int | None = None
    """Step of the best validation so far."""
    best_value: float | None = None
    """Its value."""
    seconds: float = 0.0
    """Time spent in the loop, over all attempts."""
    settings: str = ""
    """Key of the settings and data that the steps depend on."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_dir / FOLDER / f"step_{step:08d}"


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer: MegatronOptimizer | None,
    description: ModelDescription,
    tokenizer: Tokenizer,
    state: TrainState,
    ranks: Ranks,
) -> Path:
    """Save on all ranks together and return the new checkpoint folder; raises StorageError where a write fails."""
    final = step_folder(run_dir, state.step)
    attempt = ranks.broadcast(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    folder = final.parent / attempt
    try:
        if ranks.is_main:
            folder.mkdir(parents=True)
        ranks.barrier()
        _save_shards(model, optimizer, folder)
        if ranks.is_main:
            description.save(folder)
            tokenizer.save(folder / "tokenizer")
            (folder / STATE_NAME).write_text(json.dumps(asdict(state), indent=2) + "\n")
        ranks.barrier()
        files = _hash_files(folder, ranks)
        if ranks.is_main:
            _commit(folder, final, files)
    except OSError as error:
        raise StorageError(
            f"{error.filename or folder}: cannot save the checkpoint: {error.strerror or error}"
        ) from error
    ranks.barrier()
    return final


def _save_shards(model: nn.Module, optimizer: MegatronOptimizer | None, folder: Path) -> None:
    # megatron's writers are threads of this process; only their result queue would start a manager process.
    filesystem_async._results_queue = queue.Queue()
    shards = _shards(model)
    if optimizer is not None:
        shards["optimizer"] = optimizer.sharded_state_dict(dict(shards), metadata=dict(_OPTIMIZER_FORM))
    dist_checkpointing.save(shards, str(folder), async_strategy="mcore", content_metadata=dict(_OPTIMIZER_FORM))


def _shards(model: Any) -> dict[str, Any]:
    """Return megatron's description of the weights of a model."""
    return dict(model.sharded_state_dict())


def _hash_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below `folder`, each rank hashing its share."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != FILES_NAME)
    own = {n: _entry(folder / n) for n in names[ranks.rank :: ranks.world_size]}
    merged: dict[str, dict[str, Any]] = {}
    for part in ranks.gather(own):
        merged.update(part)
    return dict(sorted(merged.items()))


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _commit(folder: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    (folder / FILES_NAME).write_text(json.dumps({"files": files}, indent=1) + "\n")
    for path in folder.rglob("*"):
        fsync_path(path)
    fsync_path(folder)
    if final.exists():
        # A run that was killed right after this very save is doing it again, with the same content.
        shutil.rmtree(final)
    folder.rename(final)
    fsync_path(final.parent)
    link(final, "latest")


def link(folder: Path, name: str) -> None:
    """Let `checkpoints/<name>` point to the checkpoint `folder`, in one operation."""
    temporary = folder.parent / f".{name}.{uuid.uuid4().hex[:8]}"
    temporary.symlink_to(folder.name)
    temporary.replace(folder.parent / name)
    fsync_path(folder.parent)


def newest(run_dir: Path) -> Path | None:
    """Return the newest committed checkpoint folder of a run, or None."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return None
    whole = [p for p in folder.iterdir() if _STEP_NAME.fullmatch(p.name) and (p / FILES_NAME).is_file()]
    return max(whole, default=None, key=lambda p: p.name)


def prune(run_dir: Path, keep: int, protected: set[int | None]) -> None:
    """Delete all but the `keep` newest checkpoints and the protected steps, and leftovers of broken saves."""
    folder = run_dir / FOLDER
    steps = sorted((p for p in folder.iterdir() if _STEP_NAME.fullmatch(p.name)), key=lambda p: p.name)
    spared = {step_folder(run_dir, s).name for s in protected if s is not None}
    for path in steps[: -max(keep, 1)]:
        if path.name not in spared:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step_*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(folder: Path, ranks: Ranks) -> None:
    """Check every file of a checkpoint against its hash; raises StorageError on all ranks alike."""
    try:
        expected: dict[str, dict[str, Any]] = json.loads((folder / FILES_NAME).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{folder / FILES_NAME}: not readable ({error}); the checkpoint is not whole") from error
    names = sorted(expected)[ranks.rank :: ranks.world_size]
    own = [n for n in names if not _matches(folder / n, expected[n])]
    damaged = sorted({n for part in ranks.gather(own) for n in part})
    if damaged:
        raise StorageError(f"{folder}: damaged or missing: {', '.join(damaged[:5])}; take an earlier checkpoint")


def _matches(path: Path, expected: dict[str, Any]) -> bool:
    return path.is_file() and _entry(path) == expected


def digest(folder: Path) -> str:
    """Return a hash of what a checkpoint is: weights, description and tokenizer, by the hashes of its files."""
    files = json.loads((folder / FILES_NAME).read_text())["files"]
    content = {n: e["sha256"] for n, e in files.items() if n != STATE_NAME}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> TrainState:
    """Return the state of a checkpoint."""
    return TrainState(**json.loads((folder / STATE_NAME).read_text()))


def load_weights(model: nn.Module, folder: Path, ranks: Ranks, fresh_prefixes: tuple[str, ...] = ()) -> None:
    """Load weights saved at any layout into `model`; parameters under `fresh_prefixes` keep their initial values.

    Raises StorageError on all ranks where a file is damaged.
    """
    verify(folder, ranks)
    wanted = {k: v for k, v in _shards(model).items() if not k.startswith(fresh_prefixes or ("\0",))}
    _load_into(model, reading.load(wanted, folder))


def load(model: nn.Module, optimizer: MegatronOptimizer, folder: Path, ranks: Ranks) -> TrainState:
    """Load weights, moments and state of a checkpoint saved at any layout; raises StorageError as `load_weights`."""
    verify(folder, ranks)
    shards = _shards(model)
    shards["optimizer"] = optimizer.sharded_state_dict(dict(shards), is_loading=True, metadata=dict(_OPTIMIZER_FORM))
    loaded = reading.load(shards, folder)
    optimizer.load_state_dict(loaded.pop("optimizer"))
    _load_into(model, loaded)
    return read_state(folder)


def _load_into(model: nn.Module, loaded: dict[str, Any]) -> None:
    names = {k for k, _ in model.named_parameters()}
    tensors = {k: v for k, v in loaded.items() if k in names and not isinstance(v, ShardedObject)}
    model.load_state_dict(tensors, strict=False)
