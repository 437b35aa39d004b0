"""Verify a run folder against its manifest, and likewise every run that it builds on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath

from offline_align.errors import StorageError
from offline_align.lineage.files import FileRecord, file_sha256, folder_sha256
from offline_align.lineage.manifest import BARE_MODELS, MANIFEST, Manifest, ParentRecord, read_manifest

# No real chain of stages is this long. The limit protects against forged manifests.
_MOST_GENERATIONS = 100


class Status(StrEnum):
    """How a file or a run compares with its record."""

    whole = "whole"
    damaged = "damaged"
    """It differs from what its own run wrote."""
    changed = "changed"
    """It differs from what a later run read."""
    missing = "missing"


@dataclass(frozen=True, slots=True)
class FileCheck:
    """The status of one recorded file."""

    path: str
    status: Status
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """The status of a run folder or a folder of weights, of its files, and of each of its parents.

    `status` is that of the folder itself: the first problem among its manifest, outputs and inputs.
    """

    run_dir: Path
    stage: str
    status: Status
    reason: str = ""
    outputs: tuple[FileCheck, ...] = ()
    inputs: tuple[FileCheck, ...] = ()
    parents: tuple["Verification", ...] = ()

    def problems(self) -> list[str]:
        """Return one line for each file or run that differs from its record; earliest run first."""
        chain = reversed(list(self._chain()))
        return list(dict.fromkeys(line for report in chain for line in report._own_problems()))

    def _own_problems(self) -> Iterator[str]:
        if self.reason:
            yield f"{self.run_dir}: {self.status}: {self.reason}"
        for check in (*self.outputs, *self.inputs):
            if check.status is not Status.whole:
                yield f"{self.run_dir}: {check.path}: {check.status}: {check.reason}"

    def _chain(self) -> Iterator["Verification"]:
        """Yield every report of the chain once, although several runs may share a parent."""
        seen: set[int] = set()
        queue = [self]
        while queue:
            report = queue.pop(0)
            if id(report) not in seen:
                seen.add(id(report))
                yield report
                queue.extend(report.parents)


def verify(run_dir: Path) -> Verification:
    """Verify a run folder and everything that it builds on; every file is hashed again.

    Never raises an error for a file: the report includes files that cannot be read.
    """
    return _Walk().run(run_dir.resolve(), claimed=None)


class _Walk:
    """One walk along the chain, which reads a shared parent only once."""

    def __init__(self) -> None:
        self._reports: dict[Path, Verification] = {}
        self._depth = 0

    def run(self, run_dir: Path, claimed: ParentRecord | None) -> Verification:
        if run_dir not in self._reports:
            if self._depth >= _MOST_GENERATIONS:
                return Verification(run_dir, "", Status.damaged, f"is more than {_MOST_GENERATIONS} generations back")
            # This entry is replaced after the walk. It ends the recursion if manifests name each
            # other as parents.
            self._reports[run_dir] = Verification(run_dir, "", Status.damaged, "is its own ancestor")
            self._depth += 1
            self._reports[run_dir] = self._read(run_dir, claimed.stage if claimed else "")
            self._depth -= 1
        report = self._reports[run_dir]
        if claimed is None or report.status is Status.missing:
            return report
        return _against_claim(report, claimed)

    def _read(self, run_dir: Path, stage: str) -> Verification:
        if not run_dir.is_dir():
            return Verification(run_dir, stage, Status.missing, "no such folder")
        try:
            manifest = read_manifest(run_dir)
        except StorageError as error:
            return Verification(run_dir, stage, Status.damaged, str(error))
        if manifest is not None:
            return self._check(run_dir, manifest)
        if stage in BARE_MODELS:
            return Verification(run_dir, stage, Status.whole)
        return Verification(run_dir, stage, Status.missing, f"no {MANIFEST}: the run has not finished")

    def _check(self, run_dir: Path, manifest: Manifest) -> Verification:
        outputs = tuple(_check_output(run_dir, record) for record in manifest.outputs)
        inputs = tuple(_check_file(run_dir / r.path, r, Status.changed) for r in manifest.inputs)
        parents = tuple(self.run((run_dir / parent.path).resolve(), parent) for parent in manifest.parents)
        status = next((c.status for c in (*outputs, *inputs) if c.status is not Status.whole), Status.whole)
        return Verification(run_dir, manifest.stage, status, "", outputs, inputs, parents)


def _against_claim(report: Verification, claimed: ParentRecord) -> Verification:
    """Compare a run with the record of it in its child's manifest."""
    bare = claimed.stage in BARE_MODELS
    try:
        digest = folder_sha256(report.run_dir) if bare else file_sha256(report.run_dir / MANIFEST)
    except StorageError as error:
        return replace(report, status=Status.damaged, reason=str(error))
    if digest == claimed.manifest_sha256:
        return report
    return replace(report, status=Status.changed, reason="is not what the later run was made from")


def _check_output(run_dir: Path, record: FileRecord) -> FileCheck:
    path = PurePosixPath(record.path)
    file = run_dir / path
    if path.is_absolute() or ".." in path.parts or not file.resolve().is_relative_to(run_dir):
        return FileCheck(record.path, Status.damaged, "points outside the run folder: not read")
    return _check_file(file, record, Status.damaged)


def _check_file(file: Path, record: FileRecord, otherwise: Status) -> FileCheck:
    try:
        if not file.is_file():
            return FileCheck(record.path, Status.missing, "no such file")
        size = file.stat().st_size
        if size != record.bytes:
            return FileCheck(record.path, otherwise, f"{size} bytes instead of {record.bytes}")
        same = file_sha256(file) == record.sha256
    except (OSError, StorageError) as error:
        return FileCheck(record.path, otherwise, str(error))
    return FileCheck(record.path, Status.whole) if same else FileCheck(record.path, otherwise, "other content")
