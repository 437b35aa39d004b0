"""Content keys: what a stage would produce, known before it is produced."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_align.errors import ConfigError
from offline_align.lineage.files import canonical_json, file_size, real_path, record_files, text_sha256
from offline_align.lineage.manifest import CONFIG, describe_parent, read_manifest

# Settings that change where, when or how fast something is computed, but not what.
NOT_IN_KEY = frozenset(
    {
        "run.dir",
        "run.device",
        "dry_run",
        "debug",
        "launcher",
        "parallel",
        "data.cache_dir",
        "data.num_workers",
        "trainer.max_time",
        "trainer.micro_batch_size",
        "trainer.recompute",
        "trainer.log_interval",
        "trainer.keep_checkpoints",
        "trainer.async_save",
        "trainer.profile_steps",
        "label.flush_rows",
        "generate.batch_size",
        "judge.concurrent_requests",
        "judge.retries",
        "judge.timeout_seconds",
        "convert.check",
        # Its report is an input.
        "convert.evaluation",
    }
)

_log = logging.getLogger(__name__)


def content_key(stage: str, config: dict[str, Any], inputs: Sequence[Path], parents: Sequence[Path]) -> str:
    """Return the SHA-256 of everything that determines what a stage produces.

    That is the stage, the settings that change results, and the content of the inputs and of the parents. A
    setting that names one of these files is replaced by its content, so that data and runs may be moved or
    renamed. Reads every input once: let one rank do it. Raises ConfigError for a parent that is neither a
    finished run nor a model, StorageError for an unreadable file.
    """
    records = record_files(inputs)
    digests = {record.path: record.sha256 for record in records}
    built_on = [describe_parent(path) for path in parents]
    for path, parent in zip(parents, built_on, strict=True):
        digests |= {str(path.resolve()): parent.content_sha256, parent.path: parent.content_sha256}
    content = {
        "stage": stage,
        "config": _relevant(config, digests),
        "inputs": [record.sha256 for record in records],
        "parents": [parent.content_sha256 for parent in built_on],
    }
    return text_sha256(canonical_json(content))


def completed(run_dir: Path, stage: str, key: str) -> bool:
    """Return whether `run_dir` holds the finished run of `stage` with this key, all outputs in full length.

    False means that there is work to do. Contents are not read again: that is what `verify` is for. Raises
    ConfigError where the folder holds a finished run of another stage, other settings or other inputs, and
    StorageError where its manifest is damaged.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return False
    if manifest.stage != stage:
        raise ConfigError(f"run.dir={run_dir}: holds a finished run of `{manifest.stage}`; choose another folder")
    if manifest.key != key:
        raise ConfigError(
            f"run.dir={run_dir}: holds a finished `{stage}` run with other settings or inputs "
            f"(its own are in {CONFIG}); choose another folder, or remove this one"
        )
    broken = [r.path for r in manifest.outputs if file_size(run_dir / r.path) != r.bytes]
    if broken:
        _log.warning("%s: %s is missing or cut short and is made again", run_dir, ", ".join(broken))
    return not broken


def _relevant(node: Any, digests: dict[str, str], key: str = "") -> Any:
    """Return the settings that change results, with the content in place of the names of known files."""
    if isinstance(node, dict):
        dotted = {name: f"{key}.{name}".lstrip(".") for name in node}
        values = {n: _relevant(node[n], digests, dotted[n]) for n in node if dotted[n] not in NOT_IN_KEY}
        return {name: value for name, value in values.items() if value != {}}
    if isinstance(node, list | tuple):
        return [_relevant(value, digests, key) for value in node]
    if isinstance(node, str) and node and "\0" not in node:
        path = Path(node)
        return digests.get(str(path.resolve()), digests.get(str(real_path(path)), node))
    return node
