"""Write and read `manifest.json`, the record of a finished run."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from offline_align.errors import ConfigError, DataError, StorageError
from offline_align.lineage import effort
from offline_align.lineage.files import (
    FileRecord,
    canonical_json,
    expand,
    file_sha256,
    folder_sha256,
    named_sha256,
    record_files,
    text_sha256,
    write_atomically,
)

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
LONGEST_PATH = 4096
"""The longest path that Linux accepts, in characters."""

# A folder of weights without a run is recognised by the file that describes its model.
BARE_MODELS = {"checkpoint": "model.json", "huggingface": "config.json"}


@dataclass(frozen=True, slots=True)
class ParentRecord:
    """A folder that a run builds on; `part` is the checkpoint in it, if the run names one.

    `stage` is the stage in its manifest, or `checkpoint` or `huggingface` for a folder of weights
    without a manifest. `content_sha256` is the SHA-256 of the names and contents of the files in
    the part. It represents the parent in content keys, whether or not the parent's run has finished
    since. `manifest_sha256` equals it if there is no manifest.
    """

    path: str
    stage: str
    manifest_sha256: str
    content_sha256: str
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`; `extra` has the entries that the stage adds."""

    stage: str
    key: str
    created: str
    versions: dict[str, str]
    inputs: list[FileRecord]
    parents: list[ParentRecord]
    outputs: list[FileRecord]
    extra: dict[str, Any]


def write_config(run_dir: Path, config: dict[str, Any]) -> Path:
    """Write the resolved configuration as `config.yaml`. Raises StorageError."""
    path = run_dir / CONFIG
    plain = json.loads(json.dumps(config, default=str))
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)
    write_atomically(path, text.encode())
    return path


@dataclass(frozen=True, slots=True)
class Sources:
    """Hashes of all that a run reads: input files, and the models and runs it builds on."""

    files: list[FileRecord]
    parents: dict[Path, ParentRecord]
    """By the path in the configuration."""


def read_sources(inputs: Sequence[Path], parents: Sequence[Path]) -> Sources:
    """Return the hashes of every file in `inputs` and the record of every folder in `parents`.

    A folder in `inputs` means all files in it. Raises ConfigError for a parent that is neither a
    finished run nor a model, DataError for an input that was edited after its run had written it,
    and StorageError for an unreadable file.
    """
    files = record_files(inputs)
    check_unedited(files)
    return Sources(files, {path: describe_parent(path) for path in parents})


def write_manifest(
    run_dir: Path, stage: str, key: str, sources: Sources, outputs: Sequence[Path], extra: Mapping[str, Any]
) -> Path:
    """Write `manifest.json`, which marks the run as finished: the last action of a stage.

    A folder in `outputs` means all files in it. `config.yaml` is added to the outputs, and each
    finished run that wrote one of the inputs is added to the parents. The manifest keeps `extra`
    unchanged, and adds the cost of the run (`effort`). Raises StorageError, and ValueError for an
    output outside the run folder.
    """
    root = run_dir.resolve()
    if (root / CONFIG).is_file():
        outputs = [*outputs, root / CONFIG]
    with effort.part("hashes"):
        built_on = dict.fromkeys([*sources.parents.values(), *_producers(sources.files)])
        written = _record_outputs(outputs, root)
    manifest = Manifest(
        stage=stage,
        key=key,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        inputs=[replace(r, path=_portable(Path(r.path), root)) for r in sources.files],
        parents=[replace(p, path=_portable(Path(p.path), root)) for p in built_on],
        outputs=written,
        extra={**extra, **effort.for_manifest()},
    )
    path = root / MANIFEST
    write_atomically(path, _sealed(asdict(manifest)))
    return path


def read_manifest(run_dir: Path) -> Manifest | None:
    """Return the manifest of a folder, or None if there is none or another program wrote it.

    Raises StorageError if it is damaged.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(raw, dict) or not {"stage", "key", "sha256"} & raw.keys():
        return None
    try:
        if raw.pop("sha256") != text_sha256(canonical_json(raw)):
            raise _damaged(path)
        raw["inputs"] = [_checked(FileRecord(**entry)) for entry in raw["inputs"]]
        raw["outputs"] = [_checked(FileRecord(**entry)) for entry in raw["outputs"]]
        raw["parents"] = [_checked(ParentRecord(**entry)) for entry in raw["parents"]]
        manifest = Manifest(**raw)
        if not isinstance(manifest.extra, dict) or not isinstance(manifest.stage, str):
            raise _damaged(path)
        return manifest
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error


def _checked[T: (FileRecord, ParentRecord)](record: T) -> T:
    """Return `record`, or raise TypeError if it is not valid: a manifest may be forged."""
    texts = {k: v for k, v in asdict(record).items() if k not in ("bytes", "part")}
    if not all(isinstance(v, str) for v in texts.values()) or "\0" in record.path or len(record.path) > LONGEST_PATH:
        raise TypeError(record)
    return record


def describe_parent(path: Path) -> ParentRecord:
    """Return the record of a run folder, a checkpoint in a run folder, or a folder of weights.

    Its path is absolute. Raises ConfigError if the folder is none of these, for example a run that
    has not finished.
    """
    folder = path.resolve()
    for run_dir in (folder, *folder.parents[:2]):
        manifest = read_manifest(run_dir)
        content = _content(manifest, run_dir, folder) if manifest else {}
        if manifest and content:
            seen = file_sha256(run_dir / MANIFEST)
            part = None if folder == run_dir else folder.relative_to(run_dir).as_posix()
            return ParentRecord(str(run_dir), manifest.stage, seen, named_sha256(content), part)
    for stage, sign in BARE_MODELS.items():
        if (folder / sign).is_file():
            seen = folder_sha256(folder)
            return ParentRecord(str(folder), stage, seen, seen)
    raise ConfigError(
        f"{path}: is neither a finished run (no {MANIFEST}) nor a model (no model.json or config.json); "
        f"finish that run first, or give one of its checkpoint folders"
    )


def versions() -> dict[str, str]:
    """Return the versions that results depend on, and the commit if this is a git checkout."""
    found = {"python": platform.python_version()}
    for name in ("offline-align", "torch", "megatron-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    commit = _git_commit(Path(__file__).resolve().parents[2])
    return found | ({"commit": commit} if commit else {})


def _git_commit(checkout: Path) -> str | None:
    """Return the commit of a checkout, with the suffix `-dirty` if tracked files differ from it."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _record_outputs(outputs: Sequence[Path], run_dir: Path) -> list[FileRecord]:
    files = sorted(set(expand(outputs)))
    for file in files:
        if not file.is_relative_to(run_dir):
            raise ValueError(f"{file}: an output must lie in the run folder {run_dir}")
    return [replace(r, path=Path(r.path).relative_to(run_dir).as_posix()) for r in record_files(files)]


def _content(manifest: Manifest, run_dir: Path, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a run's outputs in `folder`, by their paths in that folder."""
    files = {run_dir / record.path: record.sha256 for record in manifest.outputs}
    return {f.relative_to(folder).as_posix(): h for f, h in files.items() if f.is_relative_to(folder)}


def check_unedited(inputs: Sequence[FileRecord]) -> None:
    """Raise DataError if a file in the folder of a finished run is not the file that the run wrote.

    A result of such a file would name that run as its parent, although the run's manifest records
    other content.
    """
    for file, manifest, written in _written(inputs):
        if file.sha256 != written.sha256:
            folder = Path(file.path).parent
            raise DataError(
                f"{file.path}: is not the file that `{manifest.stage}` wrote into {folder}: run `{manifest.stage}` "
                "again, or move it out of that folder, so that it counts as data of its own"
            )


def _producers(inputs: Sequence[FileRecord]) -> Iterator[ParentRecord]:
    """Yield records of the finished runs that wrote the inputs."""
    for file, _, _ in _written(inputs):
        yield describe_parent(Path(file.path).parent)


def _written(inputs: Sequence[FileRecord]) -> Iterator[tuple[FileRecord, Manifest, FileRecord]]:
    """Yield each input that a finished run wrote, with its manifest and its record there."""
    for file in inputs:
        path = Path(file.path)
        if manifest := read_manifest(path.parent):
            yield from ((file, manifest, written) for written in manifest.outputs if written.path == path.name)


def _portable(path: Path, run_dir: Path) -> str:
    """Return a path relative to the run folder, or absolute if they share only the root."""
    shares_root_only = path.parts[1:2] != run_dir.parts[1:2]
    return str(path) if shares_root_only else os.path.relpath(path, run_dir)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as JSON with its own SHA-256 as the last entry."""
    plain = json.loads(json.dumps(manifest, default=str))
    sealed = plain | {"sha256": text_sha256(canonical_json(plain))}
    return (json.dumps(sealed, indent=2) + "\n").encode()


def _damaged(path: Path) -> StorageError:
    return StorageError(f"{path}: is damaged or was edited: restore it from a copy, or run the stage again")
